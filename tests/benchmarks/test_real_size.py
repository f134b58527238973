"""The harness on small processes and tiny models, and the whole of it at Stable Diffusion 1.5's size."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.real_size import __main__ as command_line
from benchmarks.real_size import draw, suite
from benchmarks.real_size.model import write_model
from benchmarks.real_size.report import derived, markdown
from benchmarks.real_size.stages import Stage, all_stages, growth_stages, prepare
from benchmarks.real_size.suite import OtherResultsError, run
from benchmarks.real_size.watch import Watched, watch
from icexport.models.source import ModelSource

MB = 1_000_000
GB = 1000 * MB
HOLD = "import time; held = b'x' * {size}; time.sleep(0.8)"


def look(tmp_path: Path, code: str, limit: int = 4 * GB) -> Watched:
    return watch([sys.executable, "-c", code], tmp_path, tmp_path / "log", os.environ, limit)


def test_memory_of_the_process_is_seen(tmp_path: Path) -> None:
    seen = look(tmp_path, HOLD.format(size=300 * MB))
    assert (seen.exit_code, seen.over_limit) == (0, False)
    assert 300 * MB < seen.own_peak < 400 * MB
    assert 300 * MB < seen.anonymous_peak <= seen.resident_peak < 400 * MB
    assert seen.child_peak == 0
    assert seen.peak == max(seen.own_peak, seen.exit_peak)


def test_memory_that_is_free_again_is_seen(tmp_path: Path) -> None:
    seen = look(tmp_path, f"import time; held = b'x' * {300 * MB}; del held; time.sleep(0.8)")
    assert seen.own_peak > 300 * MB
    assert seen.resident_peak < seen.own_peak


def test_the_line_before_the_largest_sum_is_kept(tmp_path: Path) -> None:
    tell = "sys.stderr.write('{}\\n'); time.sleep(0.8)"
    hold = f"held = b'x' * {300 * MB}"
    code = "; ".join(
        ["import sys, time", tell.format("small"), hold, tell.format("large"), "del held", tell.format("free")]
    )
    seen = look(tmp_path, code)
    assert seen.peak_line in ("small", "large")
    assert seen.last_lines == ("small", "large", "free")


def test_steps_of_a_log() -> None:
    log = "[1/2] check the model   10.0 s, 3/4 ...\n[1/2] check the model   12.5 s\nnote\n[2/2] draw   0.1 s\n"
    log += "[ 1/12] load   2.0 s\n"
    assert suite.parts(log) == {"check the model": 12.5, "draw": 0.1, "load": 2.0}


def test_memory_of_a_child_in_a_session_of_its_own_is_seen(tmp_path: Path) -> None:
    child = [sys.executable, "-c", HOLD.format(size=300 * MB)]
    seen = look(tmp_path, f"import subprocess; subprocess.run({child!r}, start_new_session=True)")
    assert seen.child_peak > 300 * MB
    assert seen.own_peak < 100 * MB
    assert seen.resident_peak > seen.child_peak
    assert seen.peak == max(seen.child_peak, seen.exit_peak)


def test_mapped_files_are_no_anonymous_memory(tmp_path: Path) -> None:
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(300 * MB)
    read = "file = open('weights', 'rb'); pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); pages[::4096]"
    seen = look(tmp_path, f"import mmap, time; {read}; time.sleep(0.8)")
    assert min(seen.own_peak, seen.resident_peak) > 300 * MB
    assert seen.anonymous_peak < 100 * MB


def test_silence_is_the_longest_time_without_a_line_on_stderr(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        sys.stderr.write("begin\\n")
        for text in ("half ", "a ", "line "):
            time.sleep(0.5)
            sys.stderr.write(text)
            sys.stderr.flush()
            print("something else", flush=True)
        sys.stderr.write("end\\n")
    """
    seen = look(tmp_path, code)
    assert 1.5 <= seen.longest_silence < seen.seconds
    assert seen.last_lines[-1].endswith("end")  # stdout may come between two parts of a line
    assert (tmp_path / "log").read_text().count("something else") == 3


def test_silence_up_to_the_end_counts(tmp_path: Path) -> None:
    assert look(tmp_path, "import time; time.sleep(1)").longest_silence >= 1


def test_what_passes_the_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    code = f"""if True:
        import subprocess, sys, time
        child = subprocess.Popen({child!r}, start_new_session=True)
        print(child.pid, flush=True)
        time.sleep(0.5)
        held = [b"x" * {100 * MB} for _ in range(5)]
        time.sleep(60)
    """
    seen = look(tmp_path, code, limit=300 * MB)
    assert (seen.exit_code, seen.over_limit) == (-9, True)
    assert seen.seconds < 30
    assert seen.resident_peak > 300 * MB
    status = Path(f"/proc/{seen.last_lines[0]}/status")
    assert not status.exists() or "zombie" in status.read_text()


def stage(name: str, code: str, **rest: Any) -> Stage:
    return Stage(name, ("-c", f"open('runs', 'a').write('{name} '); {code}"), **rest)


STAGES = [
    stage("good", "import pathlib; pathlib.Path('made').mkdir()", makes="made"),
    stage("bad", "raise ValueError('seven is not six')"),
    stage("crash", "import os; os.kill(os.getpid(), 11)"),
    stage("large", "import time; held = b'x' * 500_000_000; time.sleep(60)"),
    stage("needy", "pass", needs=("made", "nothing")),
    stage("new", "pass", instructions="AVX512"),
    stage("fed", "open('stages/fed.json', 'w').write('{\"seconds_per_step\": 2.5}')", needs=("made",)),
]


def test_stages_are_recorded_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_machine", lambda: {"CPU": "some", "commit": "abc", "instructions": "AVX2"})
    told: list[str] = []
    options: dict[str, Any] = {"size": "tiny", "limit": 300 * MB}
    run(STAGES, tmp_path, tell=told.append, **options)
    document = json.loads((tmp_path / "real-size.json").read_text())
    found = document["stages"]
    assert {name: (result["status"], result["exit_code"]) for name, result in found.items()} == {
        "good": ("ok", 0),
        "bad": ("failed", 1),
        "crash": ("killed", -11),
        "large": ("killed", -9),
        "needy": ("skipped", None),
        "new": ("skipped", None),
        "fed": ("ok", 0),
    }
    assert found["bad"]["last_lines"][-1] == "ValueError: seven is not six"
    assert found["crash"]["reason"] == "signal SIGSEGV"
    assert found["large"]["reason"] == "its processes passed 0.3 GB"
    assert found["large"]["peak_bytes"] > 300 * MB
    assert found["needy"]["reason"] == "nothing is not there"
    assert found["new"]["reason"] == "this CPU has no AVX512"
    assert found["fed"]["seconds_per_step"] == 2.5
    assert found["good"]["command"][0] == "python"
    assert "large: killed its processes passed 0.3 GB" in told
    assert {result.get("commit") for result in found.values()} == {"abc"}
    assert "| bad | failed: exit code 1 |" in (tmp_path / "real-size.md").read_text()

    assert (tmp_path / "runs").read_text() == "good bad crash large fed "
    (tmp_path / "nothing").touch()
    run(STAGES, tmp_path, resume=True, **options)
    assert (tmp_path / "runs").read_text().split()[5:] == ["needy"]
    again = run(STAGES[:1], tmp_path, **options)  # which fails unless what it makes is removed before
    assert again["stages"]["good"]["status"] == "ok"
    assert again["stages"].keys() == found.keys()


def test_results_of_another_size_are_not_mixed(tmp_path: Path) -> None:
    document = run([], tmp_path, size="tiny", limit=GB)
    assert {"CPU", "cores", "threads", "torch"} <= document["machine"].keys()
    (tmp_path / "real-size.json").write_text('{"schema": 1, "size": "sd15"}')
    with pytest.raises(OtherResultsError, match="size sd15, not tiny"):
        run([], tmp_path, size="tiny", limit=GB)
    (tmp_path / "real-size.json").write_text("[]")
    with pytest.raises(OtherResultsError, match="holds no results"):
        run([], tmp_path, size="tiny", limit=GB)


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert command_line.main([*output, "--stages", "model,modle"]) == 2
    assert "--stages modle: the stages are model, build-fp32," in capsys.readouterr().err
    assert command_line.main([*output, "--memory-limit", "0"]) == 2
    assert not (tmp_path / "out").exists()


def test_exit_code_tells_of_stages_that_did_not_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "_machine", dict)
    arguments = ["--output", str(tmp_path), "--build-options=--no-verify --opset 20", "--size", "tiny"]
    assert command_line.main([*arguments, "--stages", "hit-fp16"]) == 1
    assert "| hit-fp16 | skipped: bundle-fp16/icexport.json is not there |" in capsys.readouterr().out
    found = json.loads((tmp_path / "real-size.json").read_text())["stages"]["hit-fp16"]
    assert found["command"][-3:] == ["--no-verify", "--opset", "20"]
    assert command_line.main([*arguments[:2], "--stages", "hit-fp16"]) == 2
    assert "size tiny, not sd15" in capsys.readouterr().err


def test_ratios() -> None:
    ours = {"status": "ok", "peak_bytes": 6 * GB, "anonymous_peak_bytes": 2 * GB}
    stages = {
        "generate-fp32": ours,
        "generate-fp16": {**ours, "status": "failed"},
        "steps-fp32": {"status": "ok", "seconds_per_step": 10.0},
        "eager-fp32": {**ours, "peak_bytes": 8 * GB, "seconds_per_step": 12.0},
    }
    assert derived(stages) == {
        "peak of generate-fp32 over eager-fp32": 0.75,
        "anonymous peak of generate-fp32 over eager-fp32": 1.0,
        "speed of steps-fp32 against eager-fp32": 1.2,
    }
    seen = {**ours, "reason": "", "seconds": 61.04, "peak_process": "child", "longest_silence_s": 3.0}
    document = {"stages": {"verify": seen}, "derived": {"speed": 1.2}, "machine": {"CPU": "some"}, "size": "tiny"}
    text = markdown(document)
    assert "| verify | ok | 61.0 |  | 6.00 | child | 2.00 | 3.0 |" in text
    assert "* speed: 1.20\n" in text


def test_tiny_model_is_whole_and_random(tmp_path: Path) -> None:
    told: list[str] = []
    folder = tmp_path / "model"
    write_model(folder, "tiny", told.append)
    source = ModelSource.find("canny", str(folder))
    controlnet = source.controlnet_model(torch.float32)
    assert all(parameter.any() for parameter in controlnet.parameters())
    assert source.probe_model(torch.float32) is not None
    assert len(source.tokenizer()) == source.text_encoder(torch.float32).config.vocab_size
    assert UNet2DConditionModel.from_pretrained(folder / "unet").dtype == torch.float32
    write_model(folder, "tiny", told.append)
    assert told[-2:] == [f"wrote {folder}", f"{folder} is there"]
    (folder / "random.json").write_text('{"size": "sd15"}')
    write_model(folder, "tiny", told.append)
    assert told[-1] == f"wrote {folder}"


def test_bundle_and_diffusers_draw_the_same(
    tmp_path: Path, tiny_model: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.tile(np.uint8([0, 255]), (16, 24))[:, :16]).convert("RGB").save(tmp_path / "control.png")
    pictures = []
    for kind, folder in (("bundle", tiny_bundle), ("diffusers", tiny_model)):
        result = tmp_path / kind
        where = ["--control", str(tmp_path / "control.png"), "--result", str(result)]
        monkeypatch.setattr(sys, "argv", ["draw", kind, str(folder), *where])
        draw.main()
        found = json.loads((tmp_path / f"{kind}.json").read_text())
        assert len(found["step_seconds"]) == draw.STEPS - 1
        assert 0 < found["seconds_per_step"] < found["draw_seconds"]
        pictures.append(np.asarray(Image.open(tmp_path / f"{kind}.png")).astype(int))
    assert pictures[0].std() > 0
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_each_stage_needs_what_one_before_it_makes() -> None:
    for size, stages in itertools.product(("sd15", "tiny"), (all_stages, growth_stages)):
        made = {"model"}
        for found in stages(size, ["--no-verify"]):
            assert {Path(path).parts[0] for path in found.needs} <= made
            assert ("--no-verify" in found.arguments) == ("build" in found.arguments)
            made = made - {found.removes} | {found.makes}


def test_growth_leaves_no_bundle(tmp_path: Path) -> None:
    stages = growth_stages("sd15")
    assert {stage.makes for stage in stages} == {stage.removes for stage in stages}
    assert [stage.name for stage in stages if stage.name.startswith("build")] == [
        *("build-512x1", "build-640x1", "build-768x1", "build-1024x1"),
        *("build-512x2", "build-512x4"),
    ]
    controls = [Path(stage.arguments[stage.arguments.index("--control-map") + 1]) for stage in stages if stage.removes]
    prepare(tmp_path)
    assert all((tmp_path / control).is_file() for control in controls)


def test_what_a_stage_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_machine", dict)
    (tmp_path / "made").mkdir()
    run([stage("last", "pass", removes="made")], tmp_path, size="tiny", limit=GB, name="growth")
    assert not (tmp_path / "made").exists()
    assert {"growth.json", "growth.md"} < {path.name for path in tmp_path.iterdir()}


def test_pinned(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text("import os, sys; print(__name__, len(os.sched_getaffinity(0)), sys.argv[1:])")
    command = [sys.executable, "-m", "benchmarks.real_size.pinned", "1", "told", "--steps", "2"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "__main__ 1 ['--steps', '2']\n"


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of all stages at Stable Diffusion 1.5's size; 15 GB of disk."""
    folder = tmp_path_factory.mktemp("real-size")
    subprocess.run([sys.executable, "-m", "benchmarks.real_size", "--output", str(folder)], check=False)
    stages: dict[str, dict[str, Any]] = json.loads((folder / "real-size.json").read_text())["stages"]
    return stages


@pytest.mark.slow
@pytest.mark.parametrize("name", [stage.name for stage in all_stages("sd15")])
def test_every_stage_ends_well(real_size: dict[str, dict[str, Any]], name: str) -> None:
    found = real_size[name]
    assert found["status"] == "ok", found
    if "icexport" in found["command"]:
        assert found["longest_silence_s"] <= 60


@pytest.mark.slow
def test_half_precision_is_built_on_a_small_machine(real_size: dict[str, dict[str, Any]]) -> None:
    assert real_size["build-fp16"]["peak_bytes"] <= 10 * GB
    assert real_size["build-fp16"]["seconds"] <= 25 * 60


@pytest.mark.slow
def test_a_picture_takes_less_than_with_diffusers(real_size: dict[str, dict[str, Any]]) -> None:
    assert real_size["generate-fp32"]["peak_bytes"] <= real_size["eager-fp32"]["peak_bytes"]
    assert real_size["eager-fp32"]["seconds_per_step"] >= 1.1 * real_size["steps-fp32"]["seconds_per_step"]


@pytest.mark.slow
def test_a_large_picture_of_the_reference_model_fits(real_size: dict[str, dict[str, Any]]) -> None:
    assert real_size["generate-768"]["peak_bytes"] <= 2 * GB


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_identical_build_is_quick(real_size: dict[str, dict[str, Any]], dtype: str) -> None:
    assert real_size[f"hit-{dtype}"]["seconds"] <= 5
    assert "nothing was built" in "\n".join(real_size[f"hit-{dtype}"]["last_lines"])
