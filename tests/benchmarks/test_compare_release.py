"""The report on the second stage: of the runs that have finished, with the device that they trained on."""

import compare_release
import pytest


COLUMNS = dict.fromkeys(compare_release.COLUMNS, 0.5)


@pytest.fixture
def report(monkeypatch, tmp_path):
    """report(finished, *words) -> the report, where those of the runs have finished whose folders are named."""

    def run(finished: dict[str, dict], *words: str) -> str:
        monkeypatch.setenv("RADIOLOGY_DATA", str(tmp_path))
        monkeypatch.setattr("sys.argv", ["compare_release.py", "--output", str(tmp_path), *words])
        monkeypatch.setattr(compare_release, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(compare_release, "is_finished", lambda config, folder: folder.name in finished)
        monkeypatch.setattr(compare_release, "run_once", lambda *_: pytest.fail("Nothing should train."))
        monkeypatch.setattr(compare_release, "measured", lambda config, folder: finished[folder.name])
        for name in finished:
            (tmp_path / name).mkdir()
            (tmp_path / name / "run.json").write_text('{"device": "A GPU of ours"}', encoding="utf-8")
        compare_release.main()
        (path,) = tmp_path.rglob("release_radiology.md")
        assert (path.parent == tmp_path / "results") == (len(finished) == 2 * 3 * (1 + 4))
        return path.read_text(encoding="utf-8")

    return run


def test_what_has_finished_is_reported_and_nothing_is_trained(report):
    folders = ["ours-seed0-heads", "ours-seed1-heads", "ours-seed0-adapters", "clip__lt-seed2-both_towers"]
    text = report({name: COLUMNS | {"minutes": 1 + i} for i, name in enumerate(folders)}, "--finished")
    assert "Trained on A GPU of ours," in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [
        ["CLIP (LT), both towers", "1"],
        ["ours, heads alone", "2"],
        ["ours, adapters", "1"],
    ]
    assert [row[-1] for row in rows[2:]] == ["4.0", "1.5", "3.0"]


def test_the_report_of_all_runs_alone_is_among_the_results(report):
    ways = ["heads", "image_tower", "last_blocks", "both_towers", "adapters"]
    names = [f"{method}-seed{seed}-{way}" for method in ("clip__lt", "ours") for seed in range(3) for way in ways]
    text = report({name: COLUMNS | {"minutes": 1} for name in names}, "--finished")
    assert text.count("| ours, ") == text.count("| CLIP (LT), ") == 5


def test_without_any_finished_run_there_is_no_report(report):
    with pytest.raises(ValueError, match="No run has finished"):
        report({}, "--finished")


def test_every_run_has_its_own_folder_and_the_number_of_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("RADIOLOGY_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["compare_release.py", "--workers", "3", "num_train_epochs=1"])
    found = list(compare_release.runs(compare_release.parse()))
    assert len(found) == len({folder for *_, folder in found}) == 2 * 3 * (1 + 4)
    for _, way, seed, config, _ in found:
        assert config.training["dataloader_num_workers"] == 3 and config.training["seed"] == seed
        assert (config.training["num_train_epochs"] == 1) == (way != compare_release.HEADS)
        assert (config.lora is not None) == (way == "adapters")
