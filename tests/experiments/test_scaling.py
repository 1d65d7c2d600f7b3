"""What limits steps on more chips: the arithmetic on recorded programs, and that it follows them."""

import pytest

from experiments.benchmarks import common, scaling
from experiments.benchmarks.scaling import Mesh, Program
from launch import tpu

P = 1.5e9
V5E = Program("v5e", flop=15e9, hbm=40e6, temporaries=2.5e6, fsdp=8.0, tensor=6e5, slices=1.0)


def test_times_are_the_formulas():
    """Of four slices of data 2, fsdp 4, tensor 2, with 2,048 tokens a device."""
    chip, took = tpu.CHIPS["v5e"], scaling.times(V5E, Mesh(4, 2, 4, 2), 2048, P)
    ici = 8 * P / 2 * 3 / 4 + 8 * P / 8 / 2 + 6e5 * 2048 * 2
    dcn = 8 * P / 16 * 3 / 4
    wanted = (15e9 * 2048 / 197e12, 40e6 * 2048 / 819e9, ici / 200e9, dcn / chip.dcn_gb_s / 1e9)
    assert list(took.values()) == pytest.approx([1e3 * seconds for seconds in wanted])


def test_compute_covers_from_where_it_is_as_long_as_what_is_sent():
    mesh = Mesh(4, 2, 4, 2)
    enough = scaling.covered(V5E, mesh, P)
    took = scaling.times(V5E, mesh, enough, P)
    assert took["compute_ms"] == pytest.approx(max(took["ici_ms"], took["dcn_ms"]))
    assert scaling.covered(V5E._replace(tensor=6e7), mesh, P) is None, "activations grow faster than compute"


def test_a_row_is_read_by_the_sizes_of_its_groups():
    """What a mesh of given coefficients sends is read back as them."""
    mesh, tokens = Mesh(2, 4, 16, 2), 2048
    sent = {"all-gather": (16, 8 * P / 2 * 15 / 16), "all-reduce": (2, 6e5 * tokens * 2), "reduce-scatter": (4, 1e9)}
    rows = [{"kind": kind, "devices": size, "sent_gb": each / 1e9} for kind, (size, each) in sent.items()]
    crossing = 3 * 8 * P / 128 / 2
    rows.append({"kind": "all-reduce", "devices": 2, "dcn": True, "sent_gb": crossing / 1e9})
    row = {"mesh": "data:8,fsdp:16,tensor:2", "topology": "2xv5e:8x16", "devices": 256, "collectives": rows}
    row |= {"gflop": 15 * tokens, "hbm_gb": 0.04 * tokens, "temporaries_gb": 2.5e-3 * tokens}
    got = scaling.read(row | {"batch": 256, "length": 2048}, P)._asdict()
    wanted = V5E._replace(slices=3.0)._asdict()
    assert got.pop("chip") == wanted.pop("chip")
    assert got == pytest.approx(wanted)
    assert str(mesh) == row["mesh"]


@pytest.mark.parametrize("chips", scaling.TOKENS)
def test_meshes_fit(chips):
    """They make up the chips, have a row for every group and fit into memory; a smaller model has more of them."""
    tokens = scaling.TOKENS[chips]
    found = scaling.meshes(V5E, chips, tokens, P)
    assert found
    for mesh in found:
        assert mesh.slices * mesh.data * mesh.fsdp * mesh.tensor == chips
        assert mesh.slices * mesh.data * mesh.fsdp * scaling.LENGTH <= tokens
        assert 2048 / mesh.fsdp % scaling.LANES == 0
        assert scaling.memory_gb(V5E, mesh, tokens / chips, P) < tpu.CHIPS["v5e"].hbm_gb * 2**30 / 1e9
    assert set(found) <= set(scaling.meshes(V5E, chips, tokens, P / 100))


def test_the_formulas_give_back_what_was_read():
    """Of every recorded program with its own mesh: exactly, but for what XLA sends beside."""
    n_parameters, rows = scaling.parameters(), common.read("pods")["rows"] + common.read("pods_before")["rows"]
    wanted = [row for row in rows if (row["model"], row["length"]) == (scaling.MODEL, scaling.LENGTH)]
    assert wanted
    for row in wanted:
        slices, _ = tpu.slices_of(row["topology"])
        axes = {name: int(size) for name, size in (axis.split(":") for axis in row["mesh"].split(","))}
        mesh = Mesh(slices, axes.get("data", 1) // slices, axes["fsdp"], axes.get("tensor", 1))
        program = scaling.read(row, n_parameters)
        program = program._replace(tensor=program.tensor or 0.0, slices=program.slices or 1.0)
        took = scaling.times(program, mesh, row["batch"] * row["length"] / row["devices"], n_parameters)
        exact = {name: row[name] for name in ("compute_ms", "hbm_ms")} | {"dcn_ms": row.get("dcn_ms", 0.0)}
        assert {name: took[name] for name in exact} == pytest.approx(exact)
        assert took["ici_ms"] == pytest.approx(row["ici_ms"], rel=0.05), row["mesh"]


def test_the_recorded_rows_give_a_table():
    result = common.read("pods")
    table = scaling.table(result["rows"])
    assert len(table) == len(scaling.TOKENS) * len(scaling.programs(result["rows"]))
    assert all(row["limit"] in ("compute", "hbm", "ici", "dcn") for row in table)
