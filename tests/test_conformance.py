"""Every registered mechanism and implementation satisfies every law."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sparseattn as sa
from sparseattn.testing import LAWS, examples, parametrize_with_checks
from sparseattn.testing.runner import LAWS_OF_DEFAULTS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small calls are slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NAMES = [record.name for record in sa.list_mechanisms()]


@parametrize_with_checks([examples(name)[0] for name in NAMES])
def test_small_options(check) -> None:
    check()


@parametrize_with_checks([m for n in NAMES for m in examples(n)[1:]], laws=LAWS_OF_DEFAULTS)
def test_defaults(check) -> None:
    check()


def test_there_are_laws_for_both_kinds() -> None:
    assert {law.definition for law in LAWS.values()} == {True, False}
    assert all(law.statement.endswith(".") and law.cases for law in LAWS.values())
