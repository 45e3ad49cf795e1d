"""The card that a repository has already: its licence is kept, and that it is replaced is told."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import CardData, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from yaml import YAMLError

from .facts import read_run


README = "README.md"
LICENSE_TERMS = ("license_name", "license_link")


@dataclass
class RepositoryCard:
    """
    What is in a repository of a card.

    Args:
        text: of README.md; None where there is none, no repository, or no Hub to ask.
        private: whether the repository is; None where there is none.
    """

    text: str | None = None
    private: bool | None = None

    @cached_property
    def _front_matter(self) -> CardData:
        """Empty where somebody has broken it."""
        try:
            return CardData() if self.text is None else ModelCard(self.text, ignore_metadata_errors=True).data
        except (ValueError, TypeError, YAMLError):
            return CardData()

    @property
    def license(self) -> str | None:
        """The identifier of the weights' licence that it names."""
        found = self._front_matter.get("license")
        return found if isinstance(found, str) and found else None

    @property
    def license_terms(self) -> dict[str, str]:
        """`license_name` and `license_link`, where it has them: the Hub shows them of the licence "other"."""
        found = {name: self._front_matter.get(name) for name in LICENSE_TERMS}
        return {name: text for name, text in found.items() if isinstance(text, str) and text}

    def remarks(self, repo_id: str, folder: Path, card: str, license: str | None) -> list[str]:
        """
        What the owner should know where a new card takes its place.

        Args:
            folder: with the new card.
            card: the text of the new one.
            license: that was asked for.
        """
        found = []
        run = read_run(folder)
        trained = run["config"].training.get("card_license") if run else None
        if not license and self.license and trained not in (None, self.license):
            found.append(
                f"The card keeps the licence that it has on the Hub, {self.license}, and training.card_license is "
                f"{trained}: --license {trained} changes it."
            )
        if self.text is not None and self.text.split() != card.split():
            found.append(
                f"The card of {repo_id}, {README}, is replaced by a new one. To keep what was written there by hand, "
                "put that file into the folder and add --keep-card."
            )
        return found


def read_repository_card(api: HfApi, repo_id: str, dry_run: bool) -> RepositoryCard:
    """
    The card of a repository.

    Args:
        dry_run: where the Hub can't be asked there is none; otherwise that is an error.
    """
    try:
        info = api.repo_info(repo_id)
        private = bool(info.private)
        if README not in api.list_repo_files(repo_id, revision=info.sha):
            return RepositoryCard(None, private)
        path = api.hf_hub_download(repo_id, README, revision=info.sha)
        return RepositoryCard(Path(path).read_text(encoding="utf-8", errors="replace"), private)
    except RepositoryNotFoundError:
        return RepositoryCard()
    except (HTTPError, OSError, HFValidationError):
        if not dry_run:
            raise
        return RepositoryCard()


__all__ = ["RepositoryCard", "read_repository_card"]
