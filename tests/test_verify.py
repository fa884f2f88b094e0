"""``rlhf-jax verify``: a run that repeats, and every bit of a folder that somebody has changed."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import letters_run, letters_stage, run_stage

from rlhf_jax import cli
from rlhf_jax.cli import verify
from rlhf_jax.cli.fork import fork
from rlhf_jax.cli.stages import find_method, method_names
from rlhf_jax.config import for_algorithm, to_yaml
from rlhf_jax.errors import UserError
from rlhf_jax.training.common.opening import open_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A reward model's run of six steps, with checkpoints of the steps 4 and 6, and its data."""
    folder = tmp_path_factory.mktemp("whole")
    run_stage(letters_stage(folder, "reward_model"), "reward_model")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """The run in another place; its data stays where it was."""
    return Path(shutil.copytree(whole / "run", tmp_path / "run"))


@pytest.fixture
def repeated(whole, monkeypatch):
    """The steps are not run again: the repetition is a copy of the run."""
    monkeypatch.setattr(
        verify, "_repeat", lambda path, ours, *_: shutil.copytree(whole / "run", ours)
    )


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_array(checkpoint):
    [arrays] = (checkpoint / "state" / "d").iterdir()
    flip(arrays, arrays.stat().st_size // 2)


def record_step(checkpoint, step):
    file = checkpoint / "record" / "metadata"
    record = json.loads(json.loads(file.read_text())["record"])
    record["meta"]["step"] = step
    text = json.dumps(record)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({"record": text, "sha256": digest}))


def change(copied, **values):
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_more(copied):
    """Records a file that this machine lacks."""
    read = json.loads((copied / "manifest.json").read_text())["data"]
    change(copied, data={"reward gone": "0" * 64} | read)


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "ppo", "grpo"])
def test_a_run_of_every_stage_repeats_from_its_checkpoint_and_from_its_seed(name, tmp_path):
    """From the seed two stages: what a start draws is the same in all that are supervised, and in
    all of RL.
    """
    folder = run_stage(letters_stage(tmp_path, name), name)
    for from_scratch in (False, True) if name in ("dpo", "ppo") else (False,):
        audit = verify.verify(folder, from_scratch=from_scratch, trust_config=True)
        assert audit[:3] == ([], [], [])
        assert ("from the seed to step" in audit.compared) == from_scratch
        assert audit.compared.endswith("model/")


def test_a_run_repeats_and_its_folder_stays_as_it_is(copied):
    """The repetition finds a changed loss, so it does not copy the rows that it compares; all else
    is the same.
    """
    rows = (copied / "metrics.jsonl").read_bytes()
    loss = rows.index(b'loss": 0.', rows.index(b'"step": 5')) + len(b'loss": 0.')
    flip(copied / "metrics.jsonl", loss + 3)
    before = contents(copied)
    audit = verify.verify(copied, trust_config=True)
    assert [row[:2] for row in audit.differences] == [(5, "metrics.jsonl")]
    assert audit.compared == (
        "repeated from the checkpoint of step 4 to step 6 of 6: metrics.jsonl, samples.jsonl, "
        "checkpoints/6, model/"
    )
    assert contents(copied) == before


def test_data_may_lie_elsewhere_but_must_be_the_same(whole, copied, tmp_path, monkeypatch):
    data = whole / "pairs.json"
    moved = tmp_path / "moved.json"
    used = []

    def repeat(path, ours, config, *_):
        used.append(config.reward_model.data)
        shutil.copytree(whole / "run", ours)

    monkeypatch.setattr(verify, "_repeat", repeat)
    data.rename(moved)
    try:
        with pytest.raises(UserError, match=r"pairs\.json: no such file"):
            verify.verify(copied, trust_config=True)
        assert verify.verify(copied, data=[str(moved)], num_steps=1).differences == []
        assert used == [(str(moved),)]
        flip(moved, moved.read_bytes().index(b"yes"))
        [difference] = verify.verify(copied, data=[str(moved)]).differences
        assert difference[:3] == (None, str(moved), "sha256")
        flip(moved, moved.read_bytes().index(b"xes"))
    finally:
        moved.rename(data)


@pytest.mark.usefixtures("repeated")
def test_the_first_value_that_differs_is_named_in_each_file(copied, capsys):
    """One bit of the last loss, of a text, of an array of the last checkpoint, of the weights."""
    rows = (copied / "metrics.jsonl").read_bytes()
    flip(copied / "metrics.jsonl", rows.rindex(b'"loss": 0.') + len(b'"loss": 0.') + 3)
    samples = (copied / "samples.jsonl").read_bytes()
    flip(copied / "samples.jsonl", samples.rindex(b'"yes"') + 1)
    flip(copied / "model" / "model.safetensors", -1)
    flip_array(copied / "checkpoints" / "6")
    assert cli.run(["verify", str(copied), "--trust-config"]) == 1
    lines = capsys.readouterr().out.splitlines()
    table = [line.split(None, 2) for line in lines[-4:]]
    assert [row[:2] for row in table] == [
        ["6", "metrics.jsonl"],
        ["6", "samples.jsonl"],
        ["6", "checkpoints/6"],
        ["6", "model/model.safetensors"],
    ]
    assert table[0][2].startswith("loss ")
    assert table[1][2].split() == ["chosen", "xes", "yes"]
    assert "is damaged" in table[2][2]
    assert table[3][2].startswith(
        f"bytes[{(copied / 'model/model.safetensors').stat().st_size - 1}] "
    )


@pytest.mark.usefixtures("repeated")
def test_another_state_is_named_by_array_index_and_values(copied):
    """The checkpoint of another run is whole, but its numbers are not those of the steps."""
    shutil.rmtree(copied / "checkpoints" / "6")
    shutil.copytree(copied / "checkpoints" / "4", copied / "checkpoints" / "6")
    record_step(copied / "checkpoints" / "6", 6)
    *rows, last = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    compact = json.dumps(json.loads(last), separators=(",", ":"))  # the same values
    (copied / "metrics.jsonl").write_text("".join([*rows, compact, "\n"]))
    audit = verify.verify(copied, trust_config=True)
    [row, (step, file, place, recorded, repeated)] = audit.differences
    assert row[:3] == (6, "metrics.jsonl", "the row")
    assert (step, file) == (6, "checkpoints/6")
    assert place.startswith("opt_state/count[] (first of ")
    assert (recorded, repeated) == ("4", "6")


@pytest.mark.usefixtures("repeated")
def test_steps_between_are_those_that_are_compared(copied):
    """A bit of step 5 is out of the span that ends at 4, and of the rows before a checkpoint."""
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows[3] = rows[3].replace("0", "1", 1)
    (copied / "metrics.jsonl").write_text("".join(rows))
    audit = verify.verify(copied, from_scratch=True, num_steps=2, trust_config=True)
    assert audit.differences == []
    assert audit.compared == "repeated from the seed to step 2 of 6: metrics.jsonl, samples.jsonl"
    assert verify.verify(copied, start=4, num_steps=1, trust_config=True).differences == []
    [difference] = verify.verify(
        copied, from_scratch=True, num_steps=3, trust_config=True
    ).differences
    assert difference[:2] == (3, "metrics.jsonl")


def test_drawn_steps_begin_at_the_nearest_checkpoint(tmp_path):
    """Of ten steps with checkpoints of 3, 6 and 10, which --all also repeats from the seed."""
    rows = "".join(f'{{"step": {step}}}\n' for step in range(1, 11))
    (tmp_path / "metrics.jsonl").write_text(rows)
    for step in (3, 6, 10):
        (tmp_path / "checkpoints" / str(step) / "record").mkdir(parents=True)

    def drawn(count, seed, from_scratch=False):
        return verify._spans(tmp_path, None, count, from_scratch, seed)

    assert drawn(7, 0) == [(3, 6, 10, (4, 5, 6)), (6, 10, 10, (7, 8, 9, 10))]
    assert drawn(10, 0, True)[0] == (None, 3, 10, (1, 2, 3))
    counts = dict.fromkeys(range(1, 11), 0)
    for seed in range(700):
        spans = drawn(2, seed)
        assert spans == drawn(2, seed)
        for start, stop, end, steps in spans:
            assert (stop, end) == (steps[-1], 10)
            assert all(start < step and (start == 6 or step <= 6) for step in steps)
            for step in steps:
                counts[step] += 1
    assert [counts[step] for step in (1, 2, 3)] == [0, 0, 0]
    assert all(150 < counts[step] < 250 for step in range(4, 11))  # 200 on the mean
    with pytest.raises(UserError, match=r"these steps before its end: 3, 6; 7 of its 10 .* --all "):
        drawn(8, 0)
    with pytest.raises(UserError, match="has 10 steps"):
        drawn(11, 0, True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="before its end: none; 0 of its 10 steps"):
        drawn(1, 0)


@pytest.mark.usefixtures("repeated")
def test_a_challenge_prints_its_seed_and_finds_what_was_changed(copied, capsys, monkeypatch):
    """Both steps after the checkpoint of step 4; with --all a change before it is found too."""
    monkeypatch.setattr(verify.secrets, "randbelow", lambda limit: limit - 1)
    assert cli.run(["verify", str(copied), "--trust-config", "--random", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "steps drawn at random by --seed 4294967295\ndrawn 5, 6: repeated from the "
    )
    assert said.endswith("checkpoints/6, model/\nthe same bytes\n")
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows[1] = rows[1].replace("0", "1", 1)
    rows[5] = rows[5].replace("0", "1", 1)
    (copied / "metrics.jsonl").write_text("".join(rows))
    options = {"num_steps": 6, "from_scratch": True, "draw": 0}
    audit = verify.verify(copied, trust_config=True, **options)
    assert [row[:2] for row in audit.differences] == [(1, "metrics.jsonl"), (5, "metrics.jsonl")]
    assert audit.compared.startswith("drawn 1, 2, 3, 4: repeated from the seed to step 4 of 6: ")
    assert "\ndrawn 5, 6: repeated from the checkpoint of step 4 to step 6" in audit.compared


def test_a_run_of_more_devices_is_repeated_on_those_that_are_here(copied):
    settings = (copied / "config.yaml").read_text()
    assert "  data: -1\n" in settings
    (copied / "config.yaml").write_text(settings.replace("  data: -1\n", "  data: 8\n"))
    recorded = verify.read_manifest(copied)
    assert verify.read_config(copied, recorded, [], [], trust_config=True).mesh.data == -1


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ([[1.0, 2.0], [3.0, np.nan]], None),
        ([[1.0, 2.0], [9.0, 9.0]], ("[1, 0]", "3.0", "9.0")),
        ([1.0, 2.0, 3.0, np.nan], ("", "float32[2, 2]", "float32[4]")),
        (None, ("", "float32[2, 2]", "not there")),
    ],
)
def test_the_first_number_that_differs(new, expected):
    old = np.array([[1.0, 2.0], [3.0, np.nan]], np.float32)
    assert verify._unequal(old, None if new is None else np.array(new, np.float32)) == expected


def test_the_text_around_the_first_character_that_differs():
    assert verify._unequal("same", "same") is None
    before = "x" * 40
    excerpts = verify._unequal(f"{before}a{before}", f"{before}b{before}")
    assert excerpts == ("", f"{'x' * 24}a{'x' * 23}", f"{'x' * 24}b{'x' * 23}")


def damage_config(copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    return "config.yaml", "seed", "0", "1"


def damage_start(copied):
    flip_array(copied / "checkpoints" / "4")
    return "checkpoints/4", "", "is damaged", ""


def damage_record(copied):
    flip(copied / "checkpoints" / "6" / "record" / "metadata", 100)
    return "checkpoints/6", "", "does not match its checksum", ""


def damage_manifest(copied):
    [(name, digest)] = json.loads((copied / "manifest.json").read_text())["data"].items()
    change(copied, data={name: "0" * 64})
    return name, "sha256", "0" * 64, digest


@pytest.mark.parametrize("damage", [damage_config, damage_start, damage_record, damage_manifest])
def test_what_a_run_began_with_is_checked_before_anything_is_repeated(damage, copied):
    file, place, recorded, repeated = damage(copied)
    audit = verify.verify(copied, trust_config=True)
    [difference] = audit.differences
    assert difference[1:3] == (file, place)
    assert recorded in difference.recorded
    assert difference.repeated == repeated
    assert audit.compared.startswith("nothing was repeated")


@pytest.mark.slow
def test_of_two_files_elsewhere_the_changed_one_is_named(tmp_path):
    config = letters_stage(tmp_path, "reward_model")
    (name,) = config.reward_model.data
    first = Path(name)
    second = tmp_path / "more.json"
    other_rows = json.loads(first.read_text())[::-1]
    second.write_text(json.dumps(other_rows))
    stage = dataclasses.replace(config.reward_model, data=(name, str(second)))
    folder = run_stage(dataclasses.replace(config, reward_model=stage), "reward_model")
    moved = first.rename(tmp_path / "moved.json")
    assert verify.verify(folder, data=[str(moved), str(second)], num_steps=1).differences == []
    second.write_text(json.dumps(other_rows[1:]))
    [difference] = verify.verify(folder, data=[str(moved), str(second)]).differences
    assert difference[:3] == (None, str(second), "sha256")


@pytest.mark.usefixtures("repeated")
def test_another_machine_is_described(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    versions = manifest["versions"] | {"jax": "0.1"}
    change(copied, versions=versions, cpu="riscv64", backend="gpu")
    settings = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(settings.replace("keep_last: 2", "keep_last: 3"))
    audit = verify.verify(copied, num_steps=1, trust_config=True)
    assert audit.differences == []
    assert any("versions.jax was '0.1'" in sentence for sentence in audit.machine)
    assert any("cpu was 'riscv64'" in sentence for sentence in audit.machine)
    assert "without --deterministic" in audit.unsure[0]


@pytest.mark.usefixtures("repeated")
def test_what_a_fork_has_changed_is_named(copied):
    """Before its step the settings were others."""
    change(copied, fork={"run": "x", "step": 4, "changes": ["a.b was 1 and is now 2"]})
    [unsure] = verify.verify(copied, trust_config=True).unsure
    assert "a.b was 1 and is now 2" in unsure
    change(copied, fork={"changes": 5})
    with pytest.raises(UserError, match=r"manifest\.json: fork"):
        verify.verify(copied, trust_config=True)


def set_in_config(copied, **values):
    file = copied / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


@pytest.mark.usefixtures("repeated")
def test_a_number_that_is_written_in_another_way_is_no_difference(copied):
    file = copied / "config.yaml"
    text = file.read_text()
    assert "warmup_steps: 0.0" in text
    file.write_text(text.replace("warmup_steps: 0.0", "warmup_steps: 0"))
    assert verify.verify(copied, trust_config=True).differences == []
    file.write_text(text.replace("warmup_steps: 0.0", "warmup_steps: 1", 1))
    [difference, *_] = verify.verify(copied, trust_config=True).differences
    assert difference[1:] == ("config.yaml", "rl.optimizer.warmup_steps", "0.0", "1")


@pytest.mark.usefixtures("repeated")
def test_who_started_a_run_and_whom_it_told_is_not_repeated(copied, monkeypatch):
    """Nothing is asked of other processes, of services, or of other runs."""
    monkeypatch.setattr("rlhf_jax.runs.processes.join", lambda place: pytest.fail(place))
    monkeypatch.setattr("rlhf_jax.runs.trackers.check", lambda names: names and pytest.fail(names))
    set_in_config(
        copied, processes="their.host:80,2,1", track=["wandb"], overwrite=True, output_dir="/etc"
    )
    change(copied, resumed=[])  # a run that says that it was resumed never
    assert verify.verify(copied, trust_config=True).differences == []


@pytest.mark.parametrize(
    "values",
    [
        {"reward": ["run/evil.py:score"]},
        {"judge": {"url": "HTTP://their.host/v1", "model": "m"}},
        {"rl": {"environment": "beside.py:f"}},
        {"reward_model": {"data": ["/dev/zero"]}},
    ],
)
def test_nothing_that_a_run_names_is_touched_without_trust(values, copied, monkeypatch):
    for name in ("run/evil.py", "beside.py"):
        (copied.parent / name).write_text("raise SystemExit('it ran')")
    set_in_config(copied, **values)
    monkeypatch.chdir(copied.parent)
    reads = "rlhf_jax.cli.verify.checksums"
    monkeypatch.setattr(reads, lambda config, stage: pytest.fail("read before it was asked"))
    key = next(iter(values))
    with pytest.raises(UserError, match=rf"config\.yaml.*: (data|{key}).*\n.*--trust-config"):
        verify.verify(copied)


def test_a_setting_of_the_script_that_made_the_run_is_no_mistake(copied, capsys):
    set_in_config(copied, gain=0.5)
    [difference] = verify.verify(copied, trust_config=True).differences  # none of the checkpoint's
    assert difference[1:4] == ("config.yaml", "gain", "not set")
    assert "gain is read by the script" in capsys.readouterr().out
    set_in_config(copied, gain={"of": 1})
    with pytest.raises(UserError, match="unknown key gain"):
        verify.verify(copied, trust_config=True)


def test_python_is_named_as_not_known_to_repeat(tmp_path, monkeypatch):
    """Of a run that ended before its first step."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(letters_run(tmp_path), output_dir="run")
    with open_run(config, "vpg", verify.checksums(config, "vpg")) as run:
        folder = run.folder.path
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    flip(tmp_path / "prompts.json", (tmp_path / "prompts.json").read_bytes().index(b"say"))
    audit = verify.verify(folder, trust_config=True)
    assert "reward.py:same is Python code, which is not known to repeat" in audit.unsure[0]
    assert [row.place for row in audit.differences] == ["sha256"]
    with pytest.raises(UserError, match="runs the Python code"):
        verify.verify(folder)
    # What is typed needs no trust.
    typed = verify.verify(folder, reward=config.reward, data=("prompts.json",))
    assert [row.place for row in typed.differences] == ["sha256"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match="--trust-config"):
        verify.verify(tmp_path / folder)


@pytest.mark.parametrize("name", method_names())
def test_a_method_that_is_no_stage_is_read_with_its_section(name, tmp_path, monkeypatch):
    """The fork of a folder as its run leaves it, without its arrays, up to its training."""
    monkeypatch.setattr(verify, "start_differences", lambda *_: [])
    monkeypatch.setattr(verify, "train", lambda *_: pytest.fail("begun"))
    config = letters_stage(tmp_path, "rloo")
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    config, section = for_algorithm(config, find_method(name))
    kinds = {type(value): key for key, value in reversed(vars(section).items())}
    expected = {kinds[float]: 0.25} | ({kinds[bool]: False} if bool in kinds else {})
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    module = {"import": f"rlhf_jax.algorithms.{name}"}
    facts = {"stage": name, "data": {}, "versions": {}, "given": {"algorithm": module}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(facts))
    other = shutil.copyfile(tmp_path / "prompts.json", tmp_path / "other.json")
    more = ["rl.kl_coef=7", f"rl.data=[{other}]"]
    changes = [f"{name}.{key}={str(value).lower()}" for key, value in expected.items()]
    with pytest.raises(pytest.fail.Exception, match="begun"):
        fork(tmp_path / "run", 2, tmp_path / "fork", more + changes, trust_config=True)
    settings = yaml.safe_load((tmp_path / "fork" / "config.yaml").read_text())
    assert settings["rl"]["kl_coef"] == 7
    assert settings[name].items() >= expected.items()
    written = json.loads((tmp_path / "fork" / "manifest.json").read_text())
    assert str(other) in written["data"]
    assert written["given"] == facts["given"]


@pytest.mark.slow
def test_a_run_of_a_method_that_is_no_stage_repeats_and_is_forked(tmp_path, capsys):
    config = dataclasses.replace(letters_stage(tmp_path, "vpg"), reward=("regex:a",))
    run = run_stage(config, "spo")
    audit = verify.verify(run, from_scratch=True, trust_config=True)
    assert audit[:3] == ([], [], [])
    assert audit.compared.endswith("model/")
    fork(run, 2, tmp_path / "fork", ["spo.exploration=0.5"], trust_config=True)
    assert "spo.exploration was" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "fork/config.yaml").read_text())["spo"]["exploration"] == 0.5
    [unsure] = verify.verify(tmp_path / "fork", start=2, trust_config=True).unsure
    assert "spo.exploration was" in unsure


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda run: (run / "manifest.json").unlink(), {}, "manifest.json: cannot be read"),
        (lambda run: change(run, stage="vapo"), {}, "stage vapo is not one of this package"),
        (lambda run: change(run, stage="sft.x"), {}, "stage sft.x is not one of this package"),
        (lambda run: change(run, given={"reward": "x"}), {}, "Python gave it reward"),
        (
            lambda run: change(run, stage="maxrl", given={"algorithm": {"import": "maxrl"}}),
            {},
            "Python gave it algorithm",
        ),
        (
            lambda run: change(run, resumed=[{"changed": "x"}]),
            {},
            r"resumed\[0\].changed: Expected `array`, got `str`",
        ),
        (lambda run: change(run, threads="x"), {}, "threads: Expected `int . null`, got"),
        (lambda run: os.mkfifo(run / "checkpoints/4/x"), {}, "checkpoints/4/x: is no file"),
        (lambda run: change(run, data="x"), {}, "data: Expected `object`, got `str`"),
        (lambda run: (run / "metrics.jsonl").write_text(""), {}, "metrics.jsonl has no rows"),
        (read_more, {}, "reward gone: the run read it"),
        (lambda run: None, {"start": 5}, "--from 5: .* has these checkpoints before its end: 4$"),
        (lambda run: None, {"start": 6}, "--from 6: .* before its end: 4$"),
        (lambda run: None, {"num_steps": 0}, "--steps must be at least 1"),
        (lambda run: None, {"start": 4, "from_scratch": True}, "give one of them"),
        (lambda run: None, {"start": 4, "draw": 0}, "leave out --from"),
        (lambda run: None, {"num_steps": 0, "draw": 0}, "--steps must be at least 1"),
        (lambda run: None, {"draw": 0}, "--random --steps 3: .* its end: 4; 2 of its 6 steps"),
        (lambda run: (run / "model/x").symlink_to("/etc/passwd"), {}, "is a symbolic link"),
        (lambda run: (run / "config.yaml").write_text("seed: ["), {}, "cannot be read as YAML"),
        (lambda run: None, {"model": "no/model"}, "no/model"),
    ],
)
def test_a_folder_that_cannot_be_repeated_is_a_sentence(damage, options, message, copied):
    damage(copied)
    with pytest.raises(UserError, match=message):
        verify.verify(copied, trust_config=True, **options)


def test_a_folder_of_several_runs_names_them(copied):
    with pytest.raises(UserError, match=rf"holds several runs; give one of them: {copied}"):
        verify.verify(copied.parent)
