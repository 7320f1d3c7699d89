"""Random accidents to a run: kill it, damage its files, move it, resume: the losses of the run that never stopped, or
a refusal that names what is wrong."""

import gc
import io
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from rich.console import Console

from runs import AtStep, losses, quiet
from titans.training import checkpoints
from titans.training.config import ConfigError
from titans.training.run import train

NUMBER = settings.default.max_examples
EXAMPLES = 2 if NUMBER == 100 else NUMBER // 20  # 100 at night
STEPS = 6


class Killed(BaseException):
    """What no handler takes for an error."""


class Accidents(RuleBasedStateMachine):
    make = None  # configuration of a run in a folder
    expected: list = []  # noqa: RUF012  of the run that never stopped

    @initialize()
    def begin(self):
        self.place = Path(tempfile.mkdtemp())
        self.folder = self.place / "run0"
        self.damaged: list[str] = []

    def teardown(self):
        shutil.rmtree(self.place, ignore_errors=True)

    def train(self, *callbacks):
        """Go on, or start; whatever the run says must be the truth."""
        output = io.StringIO()
        begun = any(self.folder.glob("checkpoint-*"))
        config = type(self).make(self.folder)
        try:
            train(config, resume=begun, console=Console(file=output, width=500), callbacks=callbacks)
        except ConfigError as refused:
            told = " ".join(str(refused).split())
            assert "already reached step" in told or any(name in told for name in self.damaged), told
            if "already reached" not in told:  # nothing whole is left: by hand one starts anew
                shutil.rmtree(self.folder)
                self.damaged = []
        except Killed:
            self.check_prefix()
        else:
            assert losses(self.folder) == type(self).expected
            self.damaged = []

    def check_prefix(self):
        """A run that was killed in its first step has no metrics yet."""
        found = losses(self.folder) if (self.folder / checkpoints.METRICS_FILE).exists() else []
        assert found == type(self).expected[: len(found)]

    @rule(step=st.integers(1, STEPS - 1))
    def kill(self, step):
        def die(model):
            raise Killed

        self.train(AtStep(step, die))

    @rule()
    def resume(self):
        self.train()

    def files(self):
        """Of the newest checkpoint."""
        newest = max(self.folder.glob("checkpoint-*/"), key=lambda p: int(p.name.split("-")[1]), default=None)
        return [] if newest is None else sorted(p for p in newest.iterdir() if p.is_file())

    @rule(data=st.data(), kind=st.sampled_from(["truncate", "flip", "remove", "empty"]))
    def damage(self, data, kind):
        files = self.files()
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        if not content:
            return
        if kind == "remove":
            file.unlink()
        else:
            at = data.draw(st.integers(0, len(content) - 1))
            if kind == "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content if kind == "flip" else content[: 0 if kind == "empty" else at])
        self.damaged.append(f"{file.parent.name}/{file.name}")

    @rule()
    def move(self):
        if self.folder.exists():
            target = self.folder.with_name(f"run{int(self.folder.name[3:]) + 1}")
            self.folder.rename(target)
            self.folder = target

    @rule(cut=st.integers(1, 30))
    def cut_metrics(self, cut):
        """What a full disk leaves: the last line torn. Its step is said to be missing, or is written again."""
        path = self.folder / checkpoints.METRICS_FILE
        if path.exists() and self.files() and not (self.folder / "model").exists():
            whole = path.read_bytes()
            step = max((int(p.name.split("-")[1]) for p in self.folder.glob("checkpoint-*")), default=0)
            kept = [line for line in whole.splitlines(keepends=True) if b"step" in line][: step + 1]
            path.write_bytes(b"".join(kept) + b'{"step": 5, "lo'[:cut])


@pytest.fixture
def cheap(monkeypatch):
    """Runs without pictures, and none of whose collections looks at what was there before."""
    monkeypatch.setattr("titans.training.run.plot_curve", lambda metrics, image: None)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def machine(tiny, tmp_path, cheap):
    def make(folder):
        overrides = (f"training.steps={STEPS}", "training.save_every=2", "training.eval_every=0")
        return tiny(folder, *overrides, "training.carry_state=true", "training.probe_every=0")

    train(make(tmp_path / "whole"), console=quiet())
    parts = {"make": staticmethod(make), "expected": losses(tmp_path / "whole")}
    return type("AccidentsOfARun", (Accidents,), parts)


def test_no_accident_changes_a_loss(machine):
    slow = [HealthCheck.too_slow]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=8, suppress_health_check=slow)
    )


def test_what_failed_once_at_night(machine):
    accidents = machine()
    accidents.begin()
    accidents.kill(step=1)  # before the first line of the metrics
    accidents.move()
    accidents.resume()
    accidents.teardown()
