"""`python -m sret_jax` prints the table of models."""

from sret_jax.models.cost import count_macs, count_params
from sret_jax.models.zoo import PUBLISHED, create_model


def main() -> None:
    """Print one line for each published model: computed parameters and MACs beside the published figures."""
    print("                                        computed                       published on ImageNet-1k")
    print("model                        image      parameters            MACs     params   FLOPs   top-1")
    for name, row in PUBLISHED.items():
        model = create_model(name)
        computed = f"{count_params(model):15,} {count_macs(model):15,}"
        print(f"{name:28} {model.image_size:5} {computed}    {row.params:5.1f} M {row.flops:5.1f} G  {row.top1:4.1f} %")


if __name__ == "__main__":
    main()
