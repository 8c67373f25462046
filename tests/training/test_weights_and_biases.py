import sys
import types

import pytest

from sret_jax import UserError
from sret_jax.training.report import Report
from sret_jax.training.weights_and_biases import open_wandb_run


class Service(types.ModuleType):
    """Stands in for the package wandb: remembers what it is told."""

    class Error(Exception):
        pass

    def __init__(self, refuses=False):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=self.Error)
        self.started, self.logged, self.exit_codes = [], [], []
        self._refuses = refuses

    def init(self, **settings):
        if self._refuses:
            raise self.Error("not logged in")
        self.started.append(settings)
        return types.SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def report_in(workdir):
    return Report(str(workdir), total_steps=10, first_step=0, steps_per_epoch=5, batch_size=4, wandb_project="sret")


def test_a_run_that_goes_on_is_the_same_run(service, tmp_path):
    for _ in range(2):
        open_wandb_run("sret", str(tmp_path), {"model": "sret_t"})
    first, second = service.started
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("sret", tmp_path.name, {"model": "sret_t"})


def test_it_gets_the_numbers_of_the_records(service, tmp_path):
    with report_in(tmp_path) as report:
        report.start(model="sret_t")
        report.train(3, {"loss": 1.5, "learning_rate": 0.1})
        report.evaluation(5, {"accuracy": 0.5, "loss": 2.0})
    (train_step, train), (evaluation_step, evaluation) = service.logged
    assert (train_step, train["train/loss"]) == (3, 1.5)
    assert (evaluation_step, evaluation["evaluation/accuracy"]) == (5, 0.5)
    assert service.exit_codes == [0]


def test_a_run_that_fails_is_told_as_failed(service, tmp_path):
    with pytest.raises(ZeroDivisionError), report_in(tmp_path) as report:
        report.start(model="sret_t")
        raise ZeroDivisionError
    assert service.exit_codes == [1]


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_wandb_run("sret", str(tmp_path), {})


def test_what_it_refuses_is_the_users_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", Service(refuses=True))
    with pytest.raises(UserError, match=r"not logged in.*WANDB_MODE=offline"):
        open_wandb_run("sret", str(tmp_path), {})
