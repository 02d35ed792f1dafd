"""The stand-in has nothing that the real InvokeAI does not have."""

import inspect
import json
import subprocess
from enum import Enum
from typing import Any

import pytest

from .setup_invokeai import PYTHON, STAMP
from .standin import MODULES, CanceledException, ImageRecordNotFoundException, InvocationContext

CONTEXT = {
    "ImagesInterface": "images", "BoardsInterface": "boards", "ModelsInterface": "models", "UtilInterface": "util",
    "ConfigInterface": "config", "LoggerInterface": "logger",
}  # fmt: skip
"""InvokeAI's class of each part of a context."""
SERVICES = {
    "heuristic_import": "invokeai.app.services.model_install.model_install_default.ModelInstallService",
    "wait_for_job": "invokeai.app.services.model_install.model_install_default.ModelInstallService",
    "unregister": "invokeai.app.services.model_install.model_install_default.ModelInstallService",
    "update_model": "invokeai.app.services.model_records.model_records_sql.ModelRecordServiceSQL",
    "get_path": "invokeai.app.services.model_images.model_images_default.ModelImageFileStorageDisk",
    "save": "invokeai.app.services.model_images.model_images_default.ModelImageFileStorageDisk",
}
"""InvokeAI's class of each method of its services."""
LACKS = """
import importlib, inspect, json, sys

def lacks(name, wanted):
    if inspect.ismodule(wanted):
        return []
    module, _, last = name.rpartition(".")
    try:
        found = importlib.import_module(module) if module.islower() else None
        if found is None:
            outer, _, kind = module.rpartition(".")
            found = getattr(importlib.import_module(outer), kind)
        found = getattr(found, last)
    except (ImportError, AttributeError) as problem:
        return [f"{name}: {problem}"]
    if isinstance(wanted, dict):
        return [f"{name}.{key}" for key, value in wanted.items() if getattr(found, key).value != value]
    known = inspect.signature(found).parameters if wanted else {}
    return [f"{name}({one})" for one in wanted if one not in known]

import invokeai.app.services.shared.graph
print("RESULT", json.dumps([one for name, wanted in json.load(sys.stdin) for one in lacks(name, wanted)]))
"""


def wanted(thing: Any) -> Any:
    """What the real one must have: an enum's values, or the names of parameters."""
    if isinstance(thing, type) and issubclass(thing, Enum):
        return {member.name: member.value for member in thing}
    if not callable(thing) or thing in (CanceledException, ImageRecordNotFoundException, InvocationContext):
        return []
    return [name for name, one in inspect.signature(thing).parameters.items() if one.kind != one.VAR_KEYWORD]


@pytest.mark.slow
@pytest.mark.skipif(not STAMP.exists(), reason="needs InvokeAI: python tests/invokeai/setup_invokeai.py")
def test_invokeai_has_every_name_parameter_and_value_of_the_stand_in(tmp_path):
    asked = [(f"{module}.{name}", wanted(one)) for module, names in MODULES.items() for name, one in names.items()]
    context = InvocationContext(tmp_path)
    for kind, part in CONTEXT.items():
        for name, one in vars(getattr(context, part)).items():
            told = [] if one is print else wanted(one)
            asked.append((f"invokeai.app.services.shared.invocation_context.{kind}.{name}", told))
    manager, images = context._services.model_manager, context._services.model_images
    parts = [*vars(manager.install).items(), *vars(manager.store).items(), *vars(images).items()]
    asked += [(f"{SERVICES[name]}.{name}", wanted(one)) for name, one in parts]
    environment = {"INVOKEAI_ROOT": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [PYTHON, "-c", LACKS], input=json.dumps(asked), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.partition("RESULT ")[2]) == []
