"""Who may read what is saved: those that the umask lets read any new file, whatever safetensors does."""

import os
import stat

import pytest
from conftest import captioner_of


@pytest.fixture(params=["0o022", "0o027", "0o077"])
def allowed(request):
    """The rights of a new file."""
    before = os.umask(int(request.param, 8))
    yield 0o666 & ~int(request.param, 8)
    os.umask(before)


def rights(folder) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_a_model_whole_and_in_shards(tiny_model, tmp_path, allowed):
    tiny_model.save_pretrained(tmp_path / "whole")
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert rights(tmp_path / "whole") == rights(tmp_path / "shards") == {allowed}
    tiny_model.save_pretrained(tmp_path / "whole")  # over what is there
    assert rights(tmp_path / "whole") == {allowed}


def test_a_captioner(tiny_processor, tmp_path, allowed):
    captioner_of(tiny_processor.tokenizer).save_pretrained(tmp_path)
    assert rights(tmp_path) == {allowed}
