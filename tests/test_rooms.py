"""The arrows between the rooms go one way: jobs → pipeline → bdnet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "bdnet": {"ray", "pipeline", "jobs", "infra", "tests", "benchmarks"},
    "pipeline": {"jobs", "infra", "tests", "benchmarks"},
    "jobs": {"infra", "tests", "benchmarks"},
    "infra": {"tests", "benchmarks"},
}


def imported(code: str, room: str) -> set[str]:
    """Top packages of every import in ``code``, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "a relative import leaves its room"
            names.add(room if node.level else str(node.module).split(".")[0])
    return names


def said(code: str) -> str:
    """What ``code`` prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_file_imports_against_the_arrows(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {
        str(file.relative_to(ROOT)): wrong
        for file in files
        if (wrong := imported(file.read_text(), room) & FORBIDDEN[room])
    }
    assert found == {}


def test_imports_are_found_wherever_they_stand():
    code = (
        "import torch.nn as nn\nfrom pipeline.audit import x\nfrom . import y\ndef f():\n    import ray, os\n"
    )
    assert imported(code, "bdnet") == {"torch", "pipeline", "bdnet", "ray", "os"}


def test_bdnet_comes_up_without_ray_and_the_other_rooms():
    # Not even through a library that it uses, nor through torchvision's or torchmetrics' optional parts.
    code = (
        "import sys, pkgutil, importlib, bdnet\n"
        "[importlib.import_module(f'bdnet.{m.name}') for m in pkgutil.iter_modules(bdnet.__path__)]\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'ray', 'pipeline', 'jobs', 'infra'}))"
    )
    assert said(code) == "[]"


def test_a_detector_does_not_pay_for_torchvision():
    # It imports torch's compiler too: seconds, and 160 MB.
    code = (
        "import sys, bdnet.model, bdnet.networks\n"
        "bdnet.networks.build('bdnet-topdown')\n"
        "print({'torchvision', 'torch._dynamo'} & set(sys.modules))"
    )
    assert said(code) == "set()"


def test_only_detectors_pay_for_torch():
    # It takes seconds and hundreds of MB, in the driver and in each worker that decodes or writes.
    code = (
        "import sys, jobs.audit, jobs.evaluate, pipeline.steps, pipeline.scoring\n"
        "print('torch' in sys.modules)"
    )
    assert said(code) == "False"
