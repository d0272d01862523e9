"""What a verification found is kept as JSON, and read without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from hasten.engines.tensorrt.verification import SizeErrors, Verification

NEAR = SizeErrors(height=1, width=1, whole=0.5, blocks={"a": 0.1, "b": 0.3, "c": 0.2})
FAR = SizeErrors(height=1, width=2, whole=0.4, blocks={"a": 0.4, "b": 0.1, "c": 0.1}, control=0.2)
FOUND = Verification(what="", whole_bar=None, block_bar=1, sizes=(NEAR, FAR), seconds=0.0)


def test_the_worst_is_the_largest_error_at_any_size() -> None:
    assert (NEAR.furthest, FAR.furthest) == ("b", "a")
    assert (FOUND.worst_whole, FOUND.worst_block) == (0.5, 0.4)


def test_what_a_manifest_holds_is_read_as_it_was() -> None:
    kept = json.loads(json.dumps(FOUND.model_dump(mode="json")))
    assert Verification.model_validate(kept) == FOUND
    with pytest.raises(ValidationError):
        Verification.model_validate({**kept, "sizes": [{"whole": 0.5}]})


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, hasten.engines.tensorrt.verification\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
