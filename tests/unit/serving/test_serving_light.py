"""The server answers without torch until a model is needed, and an adapter's place is known from its JSON alone."""

import json
import subprocess
import sys

import pytest

from preftune.core.errors import InputError, UsageError
from preftune.serving.placing import Placement, place
from preftune.serving.upstream import parse_upstream


def test_the_api_imports_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'peft'}"
    code = f"import sys, preftune.server.run, preftune.server.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "is_shared"),
    [
        ({}, True), ({"use_rslora": True}, True), ({"use_dora": True}, False), ({"modules_to_save": ["lm_head"]}, False),
        ({"bias": "all"}, False), ({"init_lora_weights": "pissa"}, False), ({"peft_type": "IA3"}, False),
        ({"target_parameters": ["experts.gate"]}, False), ({"base_model_name_or_path": None}, False),
    ],
)  # fmt: skip
def test_only_plain_adapters_share_their_base(tmp_path, changes, is_shared):
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "starter", "bias": "none", "init_lora_weights": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    folder = str(tmp_path)
    assert place(folder) == (Placement("starter", folder) if is_shared else Placement(folder))


def test_a_broken_adapter_file_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        place(str(tmp_path))
    assert place("starter") == Placement("starter")


def test_an_upstream_is_said_in_one_word():
    name, options = parse_upstream("a=http://h:1/v1/#model=b&key=K", {"K": "secret-key"})
    assert (name, options.url, options.model, options.adapters, options.key) == ("a", "http://h:1/v1", "b", "names", "secret-key")
    for bad in ("a", "a=h:1", "=http://h", "a=http://h#adapters=x", "a=http://h#what=1", "a=http://h#key=NOT_SET"):
        with pytest.raises(UsageError, match="--upstream"):
            parse_upstream(bad, {})
