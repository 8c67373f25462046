"""Top-1 and top-5 accuracy over a whole split, every example counted once."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.pipeline import eval_batches
from sret_jax.data.sources import Source
from sret_jax.data.workers import end_if_imported_by_worker
from sret_jax.errors import options_named
from sret_jax.models.sret import SReT
from sret_jax.training.build import make_model, open_split, warnings_to
from sret_jax.training.checkpoints import began_with
from sret_jax.training.compiling import compiling
from sret_jax.training.config import check_config
from sret_jax.training.distributed import check_agreement, check_hosts, compile_everywhere, tree_digest
from sret_jax.training.mesh import abstract_batch, local_rows, make_mesh, place, put_batch, replicated
from sret_jax.training.step import Metrics, TrainState, make_eval_step
from sret_jax.weights.store import load_variables

# What a config has for the arguments of `load_variables` and `create_model`.
_OPTIONS = {
    "create it with num_classes=": "evaluate it on data of as many, ",
    "ema=True": "config.init_ema",
    "fresh_head=True": "config.mode=train, with these weights as config.init_from",
}


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Evaluate the weights that `config.init_from` names, or those of the workdir's last checkpoint.

    A run that began with the weights of `config.init_from` counts for more than they: after fine-tuning, the command of
    the run with `mode=eval` evaluates what came out of it.

    Args:
      config: as for `train`.
      workdir: of a training run, or unused. Nothing is written.

    Returns:
      accuracy, top5_accuracy where there are more than five classes, loss, examples.

    Raises:
      UserError: what a user can mend; the message says how.
    """
    end_if_imported_by_worker()
    check_config(config)
    check_hosts(config)
    mesh = make_mesh(config.mesh, config.batch_size)
    source = open_split(config, config.data.eval_split)
    check_agreement("the test images", source.digest())
    model = make_model(config, source.num_classes)
    is_fine_tuned = config.init_from and began_with(workdir) == config.init_from
    path = workdir if is_fine_tuned else config.init_from or workdir
    with warnings_to(print), options_named(_OPTIONS):
        variables = load_variables(path, model, ema=config.init_ema)
    check_agreement("the weights", tree_digest(variables) if jax.process_count() > 1 else "")
    variables = place(variables, jax.tree.map(lambda _: replicated(mesh), variables))
    evaluation = Evaluation(config, model, source, mesh)
    is_first = jax.process_index() == 0
    with compiling("the evaluation step", functools.partial(print, flush=True) if is_first else lambda _: None):
        evaluation.compile(variables)
    metrics = evaluation(variables)
    if is_first:
        print(f"weights        {path}{', moving average' if config.init_ema else ''}")
        print(f"test images    {source.name}: {metrics['examples']:,.0f}")
        print(f"test accuracy  {100 * metrics['accuracy']:.2f} %")
        if "top5_accuracy" in metrics:
            print(f"top-5          {100 * metrics['top5_accuracy']:.2f} %")
        print(f"loss           {metrics['loss']:.4f}")
    return metrics


class Evaluation:
    """A function from variables to their metrics over a whole source, every example counted once."""

    def __init__(self, config: ConfigDict, model: SReT, source: Source, mesh: Mesh) -> None:
        self._config, self._model, self._source, self._mesh = config, model, source, mesh
        self._eval_step: Any = None

    @property
    def is_compiled(self) -> bool:
        """Whether the next call need not compile."""
        return self._eval_step is not None

    def compile(self, variables: Mapping[str, Any]) -> None:
        """For arrays or `jax.ShapeDtypeStruct`s with shardings; else the first call does, for its own."""
        batch_like = abstract_batch(self._mesh, self._config.batch_size, self._model.image_size, mask=True)
        self._eval_step = compile_everywhere(make_eval_step(self._model, self._mesh), variables, batch_like)

    def __call__(self, variables: Mapping[str, Any]) -> dict[str, float]:
        """The metrics, and `examples`, how many they are of."""
        if not self.is_compiled:
            self.compile(variables)
        batches = eval_batches(
            self._source,
            batch_size=self._config.batch_size,
            image_size=self._model.image_size,
            crop_ratio=self._config.data.eval_crop_ratio,
            rows=local_rows(self._mesh, self._config.batch_size),
            max_broken=self._config.data.max_broken,
            num_threads=self._config.data.threads,
            num_workers=self._config.data.workers,
        )
        sums: list[Metrics] = []
        for batch in batches:
            sums.append(self._eval_step(variables, put_batch(batch, self._mesh)))
            jax.block_until_ready(sums[-2:][0])  # else batches pile up on the device
        totals = {name: float(np.sum([s[name] for s in jax.device_get(sums)])) for name in sums[0]}
        examples = totals.pop("examples")
        return {**{name: total / examples for name, total in totals.items()}, "examples": examples}


def evaluate_state(evaluate: Evaluation, state: TrainState) -> dict[str, float]:
    """Metrics of the weights, and, with `ema_` before their names, of the moving average if there is one."""
    metrics = evaluate(state.variables)
    if state.ema is not None:
        metrics |= {f"ema_{name}": value for name, value in evaluate(state.ema).items() if name != "examples"}
    return metrics
