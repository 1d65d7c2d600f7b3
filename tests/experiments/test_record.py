"""What `experiments.record` and `experiments.horizons` refuse, before their file takes the place of another one."""

import pytest

from experiments import horizons, record
from mamba3_jax.files import write_json
from tests.launch.test_sweep import plan_of, result_of

FILE = "from tests.train.tiny import get_config as tiny\n\n\ndef get_config():\n    config = tiny()\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("VARIANTS = {'a': {}}", "file.py has VARIANTS: launch.sweep records them"),
        ("name = '../tiny'", "config.name '../tiny' is not a name"),
        ("name = ''", "config.name '' is not a name"),
        ("1 / 0", "file.py:8: ZeroDivisionError"),
    ],
)
def test_what_is_not_one_run_of_a_name_is_not_recorded(source, message, tmp_path):
    body = f"    config.{source}\n    return config\n" if "name" in source else f"    return config\n\n{source}\n"
    (tmp_path / "file.py").write_text(FILE + body)
    with pytest.raises(ValueError, match=message):
        record.check(tmp_path / "file.py", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_recorded_from_nothing(tmp_path):
    (tmp_path / "file.py").write_text(f"{FILE}    return config\n")
    record.check(tmp_path / "file.py", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs exists: a recorded run starts from nothing"):
        record.check(tmp_path / "file.py", tmp_path / "runs")


def test_horizons_are_of_the_sweep_that_the_file_asks_for(tmp_path):
    """A trial's, of fewer steps say, would take the place of the recorded ones."""
    plan, trial = plan_of(tmp_path, ""), plan_of(tmp_path, "", seeds=1)
    with pytest.raises(ValueError, match="still has no result that is as the config asks for it"):
        horizons.best_of(plan, "still", tmp_path / "still")
    (tmp_path / "still").mkdir()
    write_json(tmp_path / "still" / "result.json", result_of(trial, "still"))
    with pytest.raises(ValueError, match="has a result of another training: it has other seeds"):
        horizons.best_of(plan, "still", tmp_path / "still")
    write_json(tmp_path / "still" / "result.json", result_of(plan, "still"))
    assert horizons.best_of(plan, "still", tmp_path / "still") == plan.members[0].name
