"""An experiment that states only what differs from another one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.schema import experiment as loading
from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.inheritance import extend


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine"):
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


def test_what_is_not_in_the_file_is_taken_from_the_other_experiment(write):
    mine = load_experiment(
        write('extends = "smoke"\nname = "mine"\nstages.vpmoe_stage1.steps = 16\ntraining.clip_grad = 0.5\n')
    )
    smoke = load_experiment("smoke")
    assert (mine.name, mine.stages.vpmoe_stage1.steps, mine.training.clip_grad) == ("mine", 16, 0.5)
    assert mine.stages.vpmoe_stage2.training.clip_grad == 0.5, "what inherits inside the file follows"
    assert mine.rungs == smoke.rungs.model_copy(update=dict(mine.rungs.items()))
    assert plain(mine.data) == plain(smoke.data)
    assert mine.written.startswith('extends = "smoke"')


def test_it_is_the_same_as_if_it_had_been_written_out(write):
    whole = (loading.CONFIGS_DIR / "smoke.toml").read_text()
    longer = whole.replace('name = "smoke"', 'name = "mine"').replace("seq_len = 1024\n", "seq_len = 512\n")
    short = 'extends = "smoke"\nname = "mine"\ndata.synth_kd_v1.seq_len = 512\n'
    assert load_experiment(write(short)) == load_experiment(write(longer, "written_out"))


def test_a_table_of_another_kind_replaces_the_whole_table(write):
    mine = load_experiment(
        write('extends = "smoke"\nname = "mine"\nsources.synth = { kind = "parquet", path = "x" }\n')
    )
    assert plain(mine.sources.synth) == {"kind": "parquet", "path": "x"}


def test_files_extend_files_that_extend_files(write, tmp_path, monkeypatch):
    for name in ("smoke", "full"):
        (tmp_path / f"{name}.toml").write_bytes((loading.CONFIGS_DIR / f"{name}.toml").read_bytes())
    monkeypatch.setattr(loading, "CONFIGS_DIR", tmp_path)
    write('extends = "smoke"\nname = "a"\nseed = 5\n', "a")
    write('extends = "a"\nname = "b"\nstages.vpmoe_stage1.steps = 3\n', "b")
    b = load_experiment("b")
    assert (b.seed, b.stages.vpmoe_stage1.steps) == (5, 3)
    write('extends = "d"\nname = "c"\n', "c")
    write('extends = "c"\nname = "d"\n', "d")
    with pytest.raises(ConfigError, match=r"extends: (c → d → c|d → c → d) is a circle"):
        load_experiment("c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "smok"\nname = "mine"\n', r"mine\.toml: extends: no experiment called 'smok'.*'smoke'"),
        ('extends = "../x.toml"\nname = "mine"\n', "expected the name of an experiment in configs/"),
        ('extends = 1\nname = "mine"\n', "extends: found 1"),
        ('extends = "smoke"\n', r"mine\.toml over smoke\.toml: name: missing"),
        ('extends = "smoke"\nname = "mine"\ntraining.clip_gard = 1.0\n', "training.clip_gard.*clip_grad"),
    ],
)
def test_refusals_name_file_and_key(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(text))


tables = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
experiments = st.dictionaries(st.sampled_from("abc"), tables, max_size=3)


@given(experiments, experiments)
def test_every_value_of_the_file_stands_and_every_other_is_the_bases(base, over):
    found = extend(base, over)
    assert extend(found, over) == found
    assert extend(base, {}) == base

    def check(result, base, over):
        for key in result.keys() | base.keys() | over.keys():
            if isinstance(over.get(key), dict) and isinstance(base.get(key), dict):
                check(result[key], base[key], over[key])
            else:
                assert result[key] == (over if key in over else base)[key]

    check(found, base, over)
