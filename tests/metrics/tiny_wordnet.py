"""A WordNet of four nouns in the files of the real one, so that METEOR is tested without its download."""

from pathlib import Path

import nltk
import nltk.corpus
from nltk.corpus.reader.api import CorpusReader
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader


SYNSETS = (("tumor", "tumour", "tumour_mass"), ("mass", "lump", "tumour_mass"))
_HEADER = "  1 WordNet 3.0 Copyright, none: made for the tests\n"


class TinyWordNet:
    """`folder` holds the files; `load` puts it in the place of whatever WordNet NLTK has, `forget` leaves none."""

    def __init__(self, root: Path, monkeypatch):
        self.folder, self._monkeypatch = root / "corpora" / "wordnet", monkeypatch
        self.folder.mkdir(parents=True)
        for part in ("adj", "adv", "verb", "noun"):
            for name in (f"data.{part}", f"index.{part}", f"{part}.exc"):
                (self.folder / name).write_text("" if name.endswith(".exc") else _HEADER)
        (self.folder / "lexnames").write_text("00\tnoun.all\t1\n")
        (self.folder / "index.sense").write_text("")
        self._write_nouns()
        self._use(root)

    def _write_nouns(self) -> None:
        """data: offset, file, type, number of words in hex, word and sense, no pointer; index: word, its offsets."""
        data, offsets = _HEADER, {}
        for words in SYNSETS:
            for word in words:
                offsets.setdefault(word, []).append(f"{len(data):08d}")
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{len(data):08d} 00 n {len(words):02x} {listed} 000 | something\n"
        (self.folder / "data.noun").write_text(data)
        lines = [f"{word} n {len(at)} 0 {len(at)} 0 {' '.join(at)}\n" for word, at in sorted(offsets.items())]
        (self.folder / "index.noun").write_text(_HEADER + "".join(lines))

    def _use(self, root: Path) -> None:
        """NLTK looks in `root` alone, with a loader that has not loaded anything yet."""
        self._monkeypatch.setattr(nltk.data, "path", [str(root)])
        other_languages = LazyCorpusLoader("omw-1.4", CorpusReader, r".*\.tab")
        self._monkeypatch.setattr(
            nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, other_languages)
        )

    def forget(self) -> None:
        self._use(self.folder)
