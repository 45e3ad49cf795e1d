"""The command line of words: files, names and KEY=VALUE."""

import pytest

from gap_closed_clip.commands import CommandParser


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--max_steps", "3"], "--max_steps: write max_steps=3."),
        (["--max-steps=3"], "--max-steps=3: write max_steps=3."),
        (["--max_steps", "-1", "seed=1"], "--max_steps: write max_steps=-1."),
        (["--bf16", "seed=1"], "--bf16: write bf16=true."),
        (["--config", "demo.yaml"], "--config: write demo.yaml."),
        (["a.yaml", "--bf16"], "--bf16: write bf16=true."),
    ],
)
def test_options_are_written_as_words(words, hint):
    with pytest.raises(ValueError, match=f"^There is no option {hint}$"):
        CommandParser("train", None).parse_words(words, "WORD")


def test_words_are_handed_on_as_they_are():
    words = ["a.yaml", "max_steps=-1"]
    assert CommandParser("train", None).parse_words(words, "WORD") == words
    assert CommandParser("train", None).parse_words([], "WORD") == []
    with pytest.raises(ValueError, match="^The following arguments are required: WORD. See gap-closed-clip eval --h"):
        CommandParser("eval", None).parse_words([], "WORD", at_least_one=True)
