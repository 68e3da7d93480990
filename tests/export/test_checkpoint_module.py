"""A module of the user's own: the protocol it must follow, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from satchel.export.checkpoint import ModuleFacts, open_checkpoint, open_module
from satchel.export.checkpoint.module import load_module
from satchel.export.errors import ExportError

FACTS = ModuleFacts(vocab_size=11, max_context=32, eos_token_ids=(2, 5), bos_token_id=1)


class Tiny(torch.nn.Module):
    """One layer of attention between an embedding and a head that share their weight."""

    satchel = FACTS

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.LayerNorm(8, dtype=torch.bfloat16)
        self.register_buffer("steps", torch.arange(3))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        hidden = self.embed(input_ids)[:, None]
        return self.head(attention(hidden, hidden, hidden)[:, 0])


def test_facts_and_weights_of_a_module_are_read() -> None:
    module = Tiny()
    checkpoint = open_module(module)
    assert (checkpoint.kind, checkpoint.name, checkpoint.model_type) == ("module", "Tiny", "Tiny")
    assert (checkpoint.vocab_size, checkpoint.max_context) == (11, 32)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids, checkpoint.pad_token_id) == (1, (2, 5), None)
    assert checkpoint.module is module and not module.training
    assert checkpoint.tokenizer is None
    assert list(checkpoint.weights) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        np.testing.assert_array_equal(checkpoint.weights[name].numpy(), expected.numpy(), strict=True)
    np.testing.assert_array_equal(checkpoint.weights["embed.weight"].rows(2, 5), module.embed.weight[2:5].detach())
    assert checkpoint.weights["embed.weight"] is checkpoint.weights["head.weight"]
    assert checkpoint.stored_bytes == 11 * 8 * 4 + 2 * 8 * 2 + 3 * 8


def test_tensors_of_a_file_go_into_the_module(tmp_path: Path) -> None:
    module, other = Tiny(), Tiny()
    state = other.state_dict()
    shared = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    contents = (
        state,
        shared,
        {"state_dict": {f"_orig_mod.{n}": t for n, t in state.items()}, "step": 3, "optimizer": {"lr": 0.1}},
    )
    for content in contents:
        torch.save(content, tmp_path / "own.pt")
        weights = open_module(module, weights=tmp_path / "own.pt").weights
        assert list(weights) == list(state)
        for name, tensor in state.items():
            expected = tensor.float() if tensor.is_floating_point() else tensor
            np.testing.assert_array_equal(weights[name].numpy(), expected.numpy(), strict=True)


def test_a_file_of_another_module_is_refused(tmp_path: Path) -> None:
    file, state = tmp_path / "own.pt", Tiny().state_dict()
    cases: list[tuple[object, str]] = [
        ({**state, "tail.weight": torch.ones(2)}, "tail.weight has no place"),
        ({**state, "norm.weight": torch.ones(9)}, "norm.weight has shape"),
        ({name: tensor for name, tensor in state.items() if "norm" not in name}, "norm.weight is missing"),
        (Tiny(), "Python objects"),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(ExportError, match=message):
            open_module(Tiny(), weights=file)
    with pytest.raises(ExportError, match="no such file"):
        open_module(Tiny(), weights=tmp_path / "none.pt")
    with pytest.raises(ExportError, match="--weights"):
        open_checkpoint(file)


SOURCE = """
import torch
from satchel.export.checkpoint import ModuleFacts

class Plain(torch.nn.Module):
    def __init__(self, satchel):
        super().__init__()
        self.satchel = satchel
        self.head = torch.nn.Linear(4, 7)
    def forward(self, input_ids, position_ids, attention):
        return self.head(input_ids)

class Other(Plain):
    def forward(self, ids):
        return ids

def good(): return Plain(ModuleFacts(vocab_size=7, max_context=8))
def fails(): raise KeyError("no weights\\nhere")
def no_module(): return 3
def no_facts(): return Plain(None)
def wrong_facts(): return Plain({"vocab_size": 7})
def bad_facts(): return Plain(ModuleFacts(vocab_size=7, max_context=8, eos_token_ids=(7,)))
def other_forward(): return Other(ModuleFacts(vocab_size=7, max_context=8))
def on_meta(): return good().to("meta")
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_factory_in_a_file_is_opened(file: Path) -> None:
    checkpoint = open_checkpoint(f"{file}:good")
    assert (checkpoint.name, checkpoint.model_type, checkpoint.vocab_size) == ("mine.py", "Plain", 7)


@pytest.mark.parametrize(
    ("factory", "parts"),
    [
        ("fails", ("mine.py", "fails() failed with KeyError", "no weights")),
        ("no_module", ("mine.py", "returned int", "return a torch.nn.Module")),
        ("no_facts", ("Plain", "has no attribute `satchel`", "ModuleFacts(")),
        ("wrong_facts", ("Plain", "has dict as `satchel`", "ModuleFacts(")),
        ("bad_facts", ("bad_facts() failed", "token id 7 is outside the vocabulary of 7 ids")),
        ("other_forward", ("Other", "forward takes (ids)", "must take (input_ids, position_ids, attention)")),
        ("on_meta", ("Plain", "head.weight is on the meta device", "load the weights first")),
        ("absent", ("mine.py", "has no function absent", "define it")),
        ("number", ("mine.py", "has no function number", "define it")),
    ],
)
def test_a_module_that_breaks_the_protocol_is_refused(factory: str, parts: tuple[str, ...], file: Path) -> None:
    with pytest.raises(ExportError) as caught:
        open_checkpoint(f"{file}:{factory}")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_files_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    with pytest.raises(ExportError, match=r"broken\.py: no such file; pass file\.py:factory"):
        open_checkpoint(f"{path}:build")
    path.write_text("import no_such_package_at_all")
    with pytest.raises(ExportError, match=r"broken\.py: cannot be run: ModuleNotFoundError: .*no_such_package_at_all"):
        open_checkpoint(f"{path}:build")
    with pytest.raises(ExportError, match=r"broken\.py: .*FUNCTION"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be a positive number"),
        ({"max_context": "8"}, "max_context is '8'"),
        ({"eos_token_ids": 2}, "eos_token_ids is 2; it must be a tuple"),
        ({"bos_token_id": -1}, "token id -1 is outside the vocabulary of 11 ids"),
    ],
)
def test_wrong_facts_are_refused_where_they_are_made(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleFacts(**{"vocab_size": 11, "max_context": 32, **changes})  # type: ignore[arg-type]


def test_a_file_may_have_dataclasses_and_import_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "neighbor_of_model.py").write_text("WIDTH = 7\n")
    file = tmp_path / "model.py"
    file.write_text(
        "from __future__ import annotations\nimport dataclasses, torch\nfrom neighbor_of_model import WIDTH\n"
        "@dataclasses.dataclass\nclass Options:\n    width: int = WIDTH\n"
        "def build():\n    return torch.nn.Linear(Options().width, 1)\n"
    )
    assert load_module(file, "build").in_features == 7
