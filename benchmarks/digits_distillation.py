"""Three ways to teach the same small student the digits: from labels, from a teacher in the loop, from soft labels.

    python benchmarks/digits_distillation.py runs [--seeds 3]

Trains the teacher, makes its soft labels, trains every student with every seed, and draws the learning curves. What is
in the folder from before is not trained again. Prints a table; the picture is FOLDER/digits_distillation.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
STUDENTS = {
    "labels": ("configs/digits_distill.py", "--config.distill.teacher=", "--config.distill.temperature=1.0"),
    "teacher in the loop": ("configs/digits_distill.py", "--config.distill.teacher={folder}/digits"),
    "FKD": ("configs/digits_fkd.py", "--config.distill.soft_labels={folder}/digits_labels"),
}
LABELS = (
    *("--data=digits", "--eval-split=test", "--eval-crop-ratio=1", "--num-crops=32"),
    *("--crop-area", "0.7", "1", "--crop-aspect", "0.8", "1.25", "--flip=0", "--label-type=ori", "--temperature=4"),
)


def main() -> None:
    """See the file."""
    args = _parse_args()
    folder = args.folder.absolute()
    _run("train.py", "--config=configs/digits.py", f"--workdir={folder}/digits")
    _run("-m", "sret_jax.distill", f"--teacher={folder}/digits", *LABELS, f"--out={folder}/digits_labels")
    curves = {}
    for name, (config, *flags) in STUDENTS.items():
        for seed in range(args.seeds):
            workdir = folder / f"{name.replace(' ', '_')}_{seed}"
            given = [flag.format(folder=folder) for flag in flags]
            _run("train.py", f"--config={config}", *given, f"--config.seed={seed}", f"--workdir={workdir}")
            curves[name, seed] = _accuracies(workdir)
    print(f"{'student learns from':20}  test accuracy after the last epoch, %   mean   mean of the last three epochs")
    for name in STUDENTS:
        of_seeds = np.array([curves[name, seed] for seed in range(args.seeds)])
        last = "  ".join(f"{accuracy:5.2f}" for accuracy in of_seeds[:, -1])
        print(f"{name:20}  {last:37}  {of_seeds[:, -1].mean():5.2f}  {of_seeds[:, -3:].mean():5.2f}")
    _draw(curves, args.seeds, folder / "digits_distillation.png")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _accuracies(workdir: Path) -> list[float]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [100 * record["accuracy"] for record in records if record["kind"] == "evaluation"]


def _draw(curves: dict[tuple[str, int], list[float]], seeds: int, path: Path) -> None:
    """Mean over the seeds, and what lies between the best and the worst."""
    figure = Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(STUDENTS, ("#6e7781", "#0969da", "#bc4c00"), strict=True):
        of_seeds = np.array([curves[name, seed] for seed in range(seeds)])
        epochs = np.arange(1, of_seeds.shape[1] + 1)
        axes.plot(epochs, of_seeds.mean(axis=0), color=colour, label=name, marker="o", markersize=4)
        axes.fill_between(epochs, of_seeds.min(axis=0), of_seeds.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(80, 100.3), title="One student, three ways to learn")
    axes.grid(color="#e6e8eb")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs and the picture")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
