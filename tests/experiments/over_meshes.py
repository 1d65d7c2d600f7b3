"""A program of two devices: the rows of the benchmark of meshes in small, then again with other targets on one mesh."""

import json

from experiments.benchmarks import common, meshes
from tests.experiments.test_meshes import MEASURE, QUICK, TINY

EQUAL = [meshes.Step("tiny", mesh, 2, 16, meshes.FLOAT32) for mesh in (meshes.ONE, "fsdp:2", "sequence:2")]
TIMED = [meshes.Step("tiny", meshes.ONE, 1, 16), meshes.Step("tiny", "sequence:2", 1, 32)]


def main() -> None:
    meshes.PRESETS["tiny"] = TINY
    common.measure = lambda function, **_: MEASURE(function, **QUICK)
    written = []
    meshes.measured({"equal": EQUAL, "step": TIMED}, written.append)
    print(json.dumps(written[-1]))

    put = meshes.put

    def other(rows, mesh):
        return put(rows._replace(targets_BL=rows.tokens_BL) if "fsdp" in mesh.axis_names else rows, mesh)

    meshes.put = other
    meshes.measured({"equal": EQUAL[:2]}, written.append)
    print(json.dumps(written[-1]))


if __name__ == "__main__":
    main()
