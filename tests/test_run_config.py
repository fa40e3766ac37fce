"""hgpt/run/settings.py: files and command line, what is refused, and what a resumed run may change."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from hgpt.errors import UserError
from hgpt.model.distances import _REGISTRY
from hgpt.run.config import HeadConfig, ModelConfig, RunConfig
from hgpt.run.settings import check_resume, known_settings, load_run_config, settings, to_toml, write_toml

LORENTZIAN = Path(__file__).parent.parent / "configs" / "distances" / "lorentzian.py"
CONFIG = """
name = "x"

[data]
path = "data/x"
seq_len = 128

[model]
n_layer = 2
n_head = 2
n_embd = 64

[model.head]
type = "harmonic"
exponent = "2*sqrt_dim"

[train]
steps = 100
global_batch = 8
micro_batch = 4

[optim]
lr = 3e-3
warmup_steps = 10
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(CONFIG)
    return path


def load(path: Path, *arguments: str) -> RunConfig:
    return load_run_config(["--config", str(path), *arguments])


def refusal(path: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, *arguments)
    return str(error.value)


def edited(path: Path, old: str, new: str) -> Path:
    assert CONFIG.count(old) == 1
    path.write_text(CONFIG.replace(old, new))
    return path


# ---------------------------------------------------------------------------------------------------------------
# Reading


def test_file(file):
    config = load(file)
    in_the_file = {
        "name": "x",
        "data.path": "data/x",
        "data.seq_len": 128,
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 64,
        "model.head.type": "harmonic",
        "model.head.exponent": "2*sqrt_dim",
        "train.steps": 100,
        "train.global_batch": 8,
        "train.micro_batch": 4,
        "optim.lr": 3e-3,
        "optim.warmup_steps": 10,
    }
    assert settings(config).items() >= in_the_file.items()
    assert isinstance(config.optim.lr, float)  # PyYAML would have read "3e-3" as a string
    assert config.optim.betas == (0.9, 0.95)
    assert config.run_folder == Path("runs/x")


def test_command_line_wins_wherever_it_stands(file):
    assert load(file, "--optim.lr", "1e-4", "--train.steps=50").optim.lr == 1e-4
    before = load_run_config(["--optim.lr", "1e-4", "--name", "y", f"--config={file}"])
    assert (before.optim.lr, before.name, before.train.steps) == (1e-4, "y", 100)
    assert load(file, "--train.seed", "1", "--train.seed", "2").train.seed == 2


def test_of_two_files_the_later_wins(file, tmp_path):
    second = tmp_path / "second.toml"
    second.write_text("[train]\nsteps = 60\n")
    config = load(file, "--config", str(second))
    assert (config.train.steps, config.train.global_batch) == (60, 8)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("model.head.exponent", "14", 14.0),
        ("model.head.exponent", "27.7", 27.7),
        ("model.head.exponent", "sqrt_dim", "sqrt_dim"),
        ("model.init_from", "gpt2", "gpt2"),
        ("train.compile", "true", True),
        ("model.bias", "yes", True),
        ("optim.lr", "1", 1.0),
        ("optim.betas", "[0.8, 0.99]", (0.8, 0.99)),
        ("log.trackers", "[]", ()),
        ("log.trackers", '["tensorboard", "wandb"]', ("tensorboard", "wandb")),
        ("name", "1e3", "1e3"),
        ("data.path", "123", "123"),
        ("data.vocab_size", "null", None),
    ],
)
def test_values_on_the_command_line(file, argument, value, expected):
    found = settings(load(file, f"--{argument}", value)).get(argument)
    assert found == expected and type(found) is type(expected)


def test_the_resolved_configuration_reads_back_to_the_same(file, tmp_path):
    for config in (
        load(file),
        load(file, "--log.trackers", "[]", "--optim.betas", "[0, 0.999]", "--optim.eps", "1e-20"),
        load(edited(file, 'type = "harmonic"\nexponent = "2*sqrt_dim"', 'type = "softmax"'), "--data.vocab_size", "9"),
        # A Windows path and other characters that TOML wants escaped.
        replace(load(file, "--name", "a b é"), runs_dir='C:\\x\\u1F "q" \t\x01\x7f\n😀'),
    ):
        write_toml(config, tmp_path / "resolved.toml")
        assert load(tmp_path / "resolved.toml") == config
        assert tomllib.loads((tmp_path / "resolved.toml").read_text())["train"]["steps"] == 100


def test_toml_of_tables_in_tables():
    table = {"b": {"c": {"d": [1, 2.5e-08]}, "e": None, "f": "x"}, "a": True}
    assert to_toml(table) == 'a = true\n\n[b]\nf = "x"\n\n[b.c]\nd = [1, 2.5e-08]\n'


# ---------------------------------------------------------------------------------------------------------------
# Refusing


def test_unknown_key_in_a_file(file):
    assert refusal(edited(file, "n_layer", "n_layers")) == (
        f"{file}: there is no setting model.n_layers; did you mean model.n_layer or model.n_head or model.n_embd?"
    )


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--train.stepss", "train.steps"),
        ("--optim.learning-rate", "--help"),
        ("--lr", "optim.lr"),
        ("--train.seq_len", "data.seq_len"),
        ("--exponent", "model.head.exponent"),
        ("--zzz", "--help"),
    ],
)
def test_unknown_key_on_the_command_line(file, argument, meant):
    for arguments in ([argument, "1"], [f"{argument}=1"]):
        message = refusal(file, *arguments)
        assert message.startswith(f"command line: there is no setting {argument[2:]}; ")
        assert meant in message


def test_key_in_the_wrong_section(file):
    message = refusal(edited(file, "steps = 100", "steps = 100\nlr = 1e-3"))
    assert message == f"{file}: there is no setting train.lr; did you mean optim.lr?"


def test_sections_and_values_are_not_mixed_up(file):
    assert "there is no setting head.type; did you mean model.head.type" in refusal(
        edited(file, "[model.head]", "[head]")
    )
    assert "optim" in refusal(edited(file, "[optim]\nlr = 3e-3\nwarmup_steps = 10", ""), "--optim", "3")
    assert "unrecognized arguments: steps=3" in refusal(file, "steps=3")


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("train.steps", "1.5", "must be a whole number; got 1.5"),
        ("train.steps", "1e3", "must be a whole number; got 1000.0"),
        ("train.steps", "true", "must be a whole number; got True"),
        ("train.steps", "many", "must be a whole number; got many"),
        ("train.compile", "1", "must be true or false; got 1"),
        ("optim.lr", "abc", "must be a number; got abc"),
        ("optim.lr", "true", "must be a number; got True"),
        ("optim.betas", "0.9", "must be a list of 2, each a number; got 0.9"),
        ("optim.betas", "[0.9]", "must be a list of 2, each a number; got [0.9]"),
        ("optim.betas", '[0.9, "x"]', "must be a list of 2, each a number; got x"),
        ("model.head.type", "soft", 'must be one of "harmonic", "softmax"; got soft'),
        ("log.trackers", "wandb", 'must be a list, each one of "tensorboard", "wandb"; got wandb'),
        ("log.trackers", '["aim"]', 'must be a list, each one of "tensorboard", "wandb"; got aim'),
    ],
)
def test_mistyped_value(file, argument, value, rule):
    assert refusal(file, f"--{argument}", value) == f"{argument} {rule}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps = 100.0", "train.steps must be a whole number; got 100.0"),
        ("steps = true", "train.steps must be a whole number; got True"),
        ("steps = [1]", "train.steps must be a whole number; got [1]"),
        ('steps = "many"', "train.steps must be a whole number; got many"),
    ],
)
def test_mistyped_value_in_a_file(file, line, message):
    assert refusal(edited(file, "steps = 100", line)) == message


def test_missing_and_broken_files(file, tmp_path):
    assert refusal(tmp_path / "none.toml").startswith(f"--config {tmp_path / 'none.toml'}: cannot read the file")
    assert "Is a directory" in refusal(tmp_path)
    file.write_text("name = x")
    assert refusal(file).startswith(f"--config {file}: not valid TOML: Invalid value (at line 1")
    file.write_text('lr: 3\n"')
    assert "not valid TOML" in refusal(file)
    file.write_bytes(b"name = '\xff'")
    assert "cannot read the file" in refusal(file)
    with pytest.raises(UserError, match="--config needs a file"):
        load_run_config(["--config"])


def test_required_settings_are_named():
    with pytest.raises(UserError, match=r"are required: name, data\.path, train\.steps, train\.global_batch"):
        load_run_config([])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_name_is_one_folder(file, name):
    assert refusal(file, "--name", name) == (
        f"name must be a plain folder name, the run folder under runs_dir; got {name!r}"
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("optim.warmup_steps", "100", "optim.warmup_steps = 100 must be fewer than train.steps = 100: lower the one"),
        ("train.steps", "-5", "train.steps must be at least 1; got -5"),
        ("train.global_batch", "0", "train.global_batch must be at least 1; got 0"),
        ("train.micro_batch", "0", "train.micro_batch must be at least 1; got 0"),
        ("train.label_smoothing", "1", "train.label_smoothing must lie in [0, 1); got 1"),
        ("train.seed", "-1", "train.seed must lie between 0 and 2^31 - 1; got -1"),
        ("train.seed", "2147483648", "train.seed must lie between 0 and 2^31 - 1; got 2147483648"),
        ("data.seq_len", "0", "data.seq_len must be at least 1 token; got 0"),
        ("data.vocab_size", "0", "data.vocab_size must be at least 1; got 0"),
        ("eval.every", "0", "eval.every must be at least 1; got 0"),
        ("checkpoint.every", "0", "checkpoint.every must be at least 1 step; got 0"),
        ("checkpoint.keep_last", "-1", "checkpoint.keep_last must be 0 (keep all) or more; got -1"),
        ("log.every", "0", "log.every must be at least 1 step; got 0"),
        ("optim.min_lr", "1", "optim.min_lr must not exceed optim.lr = 0.003; got 1.0"),
    ],
)
def test_out_of_range(file, argument, value, message):
    assert refusal(file, f"--{argument}", value).startswith(message)


# ---------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("name", ["exponent", "distance"])
def test_settings_of_the_harmonic_head_with_the_softmax_head(name):
    value = {"exponent": 14.0, "distance": "euclidean"}[name]
    with pytest.raises(UserError) as error:
        HeadConfig(type="softmax", **{name: value})
    assert str(error.value) == (
        f'model.head.{name} = {value!r} has no effect with model.head.type = "softmax": remove it (on the '
        f'command line: --model.head.{name} null), or set model.head.type = "harmonic"'
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learn_exponent", True),
        ("distance_options", {"scale": 2.0}),
        ("p", 3.0),
        ("temperature", 0.5),
        ("metric", "full"),
        ("rank", 4),
    ],
)
def test_settings_of_a_distance_with_the_softmax_head(name, value):
    with pytest.raises(UserError, match=f"model.head.{name} = .* has no effect with model.head.type"):
        HeadConfig(type="softmax", **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "cosinus"}, "model.head.distance must be one of euclidean, cosine, mahalanobis, manhattan, "),
        ({"distance": "minkowski"}, 'model.head.p is required with distance = "minkowski"'),
        ({"distance": "minkowski", "p": "0.5"}, "model.head.p must be a number of at least 1"),
        ({"p": "3"}, 'model.head.p = 3.0 has no effect with distance = "euclidean", which has no options: remove it'),
        ({"distance": "hamming", "temperature": "0"}, "model.head.temperature must be a positive number; got 0.0"),
        ({"distance": "hamming", "temperature": "cold"}, "model.head.temperature must be a number or null (not set)"),
        ({"distance": "mahalanobis", "metric": "round"}, "model.head.metric must be one of diagonal, low_rank, full"),
        ({"distance": "mahalanobis", "metric": "low_rank"}, "model.head.rank is required with metric"),
        (
            {"distance": "mahalanobis", "metric": "low_rank", "rank": "1000"},
            "model.head.rank must lie between 1 and the width of the vectors, ",
        ),
        ({"distance": "mahalanobis", "rank": "4"}, 'model.head.rank = 4 has no effect with metric = "diagonal"'),
        ({"distance_file": "none.py"}, "model.head.distance_file: "),
    ],
)
def test_a_distance_that_cannot_be(file, settings, message):
    options = [part for name, value in settings.items() for part in (f"--model.head.{name}", value)]
    assert refusal(file, *options).startswith(message)


def test_settings_that_need_a_certain_distance(file):
    assert refusal(file, "--optim.metric_lr_multiplier", "2") == (
        'optim.metric_lr_multiplier = 2.0 has no effect with model.head.distance = "euclidean", where no distance is '
        "learnt: remove it"
    )
    message = refusal(file, "--optim.metric_lr_multiplier", "0")
    assert message.startswith("optim.metric_lr_multiplier must be a positive number; got 0")
    assert refusal(file, "--train.distance_memory", "64", "--model.head.distance", "cosine") == (
        'train.distance_memory = 64.0 has no effect with model.head.distance = "cosine", which goes through matrix '
        "products: remove it"
    )
    assert refusal(file, "--train.distance_memory", "0").startswith("train.distance_memory must be a positive number")
    assert refusal(file, "--train.loss_chunk", "128", "--model.head.distance", "manhattan") == (
        'train.loss_chunk = 128 has no effect with model.head.distance = "manhattan", which goes through no matrix '
        "products: remove it"
    )
    message = refusal(file, "--train.compile_loss", "true", "--model.head.distance", "manhattan")
    assert message.startswith("train.compile_loss = True has no effect with model.head.distance")
    assert refusal(file, "--train.loss_chunk", "10") == "train.loss_chunk must be at least 64 positions; got 10"
    learnt = ["--model.head.distance", "mahalanobis", "--optim.metric_lr_multiplier", "2"]
    assert load_run_config(["--config", str(file), *learnt]).optim.metric_lr_multiplier == 2
    blocks = ["--model.head.distance", "manhattan", "--train.distance_memory", "64"]
    assert load_run_config(["--config", str(file), *blocks]).train.distance_memory == 64


def test_a_distance_in_toml(file):
    text = edited(file, "[model.head]", '[model.head]\ndistance = "minkowski"\np = 3\nlearn_exponent = true')
    config = load_run_config(["--config", str(text)]).model.to_hf(vocab_size=100, seq_len=8)
    assert (config.distance, config.distance_options, config.learn_exponent) == ("minkowski", {"p": 3.0}, True)


OWN = ["--model.head.distance", "lorentzian", "--model.head.distance_file", str(LORENTZIAN)]


@pytest.mark.parametrize("where", ["toml", "command line"])
def test_options_of_a_distance_of_ones_own(file, tmp_path, where):
    arguments = ["--model.head.distance_options.scale", "0.5"] if where == "command line" else []
    if where == "toml":
        file.write_text(CONFIG + "\n[model.head.distance_options]\nscale = 0.5\n")
    config = load(file, *OWN, *arguments)
    hf = config.model.to_hf(vocab_size=100, seq_len=8)
    assert (hf.distance, hf.distance_options) == ("lorentzian", {"scale": 0.5})
    assert settings(config)["model.head.distance_options.scale"] == 0.5
    write_toml(config, tmp_path / "written.toml")
    assert load(tmp_path / "written.toml") == config
    with pytest.raises(UserError, match=r"model\.head\.distance_options\.scale: 0\.5 in the checkpoint, not set now"):
        check_resume(settings(config), load(tmp_path / "x.toml", *OWN, "--model.head.distance_options", "{}"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*OWN, "--model.head.distance_options.scale", "-1"],
            "model.head.distance_options.scale must be positive; got -1",
        ),
        (
            [*OWN, "--model.head.distance_options.unit", "2"],
            'model.head.distance_options.unit = 2 has no effect with distance = "lorentzian", which has scale: ',
        ),
        (
            ["--model.head.distance", "minkowski", "--model.head.distance_options.p", "3"],
            "model.head.distance_options.p: this is a setting of its own, model.head.p",
        ),
        (
            ["--model.head.distance_options.a.b", "3"],
            "command line: there is no setting model.head.distance_options.a.b; ",
        ),
        (
            [*OWN, "--model.head.distance_options", "3"],
            "model.head.distance_options must be a table or null (not set); got 3",
        ),
    ],
)
def test_options_that_the_distance_does_not_have(file, arguments, message):
    assert refusal(file, *arguments).startswith(message)


def test_an_option_of_ones_own_that_is_required(file, tmp_path, monkeypatch):
    monkeypatch.setattr("hgpt.model.distances._REGISTRY", dict(_REGISTRY))
    own = tmp_path / "scaled.py"
    own.write_text(
        "from hgpt import Distance, register_distance\n"
        '@register_distance("scaled")\n'
        "class Scaled(Distance):\n"
        "    def __init__(self, dim, *, factor):\n"
        "        super().__init__(dim)\n"
    )
    message = refusal(file, "--model.head.distance", "scaled", "--model.head.distance_file", str(own))
    assert message.startswith('model.head.distance_options.factor is required with distance = "scaled"')


def test_harmonic_head_without_exponent():
    with pytest.raises(UserError, match=r'model\.head\.exponent is required.*for example "2\*sqrt_dim"'):
        HeadConfig()


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        ({}, {"exponent": 0.0}, "model.head.exponent (n on the distance d) must be a positive number"),
        ({}, {"exponent": -3.0}, "model.head.exponent (n on the distance d) must be a positive number"),
        ({}, {"exponent": "2*root"}, "model.head.exponent (n on the distance d) must be a positive number"),
        ({}, {"final_norm_gain": 0.0}, "model.head.final_norm_gain must be positive; got 0.0"),
        ({"n_head": 5}, {}, "model.n_embd must be divisible by n_head; got n_embd = 64, n_head = 5"),
        ({"n_layer": 0}, {}, "model.n_layer must be at least 1; got 0"),
        ({"dropout": 1.0}, {}, "model.dropout must lie in [0, 1); got 1.0"),
        ({"activation_function": "wave"}, {}, "model.activation_function must be one that transformers knows"),
    ],
)
def test_model_out_of_range(model, head, message):
    config = ModelConfig(**({"n_embd": 64, "n_head": 2} | model), head=HeadConfig(**({"exponent": 14.0} | head)))
    with pytest.raises(UserError) as error:
        config.to_hf(vocab_size=100, seq_len=8)
    assert str(error.value).startswith(message)


def test_to_hf():
    head = HeadConfig(exponent="2*sqrt_dim", final_norm_gain=0.03, centre_init_std=0.5)
    model = ModelConfig(
        n_layer=3, n_head=4, n_embd=64, bias=True, dropout=0.1, tie_word_embeddings=False, init_from="y", head=head
    )
    config = model.to_hf(vocab_size=100, seq_len=32, end_of_text=99)
    found = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    assert found == {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 32, "vocab_size": 100}
    assert (config.head, config.exponent, config.distance) == ("harmonic", 16.0, "euclidean")
    assert (config.final_norm_gain, config.centre_init_std, config.tie_word_embeddings) == (0.03, 0.5, False)
    assert (config.bias, config.dropout, config.padded_vocab_size) == (True, 0.1, 128)
    assert config.bos_token_id == config.eos_token_id == config.pad_token_id == 99
    softmax = replace(model, head=HeadConfig(type="softmax")).to_hf(vocab_size=100, seq_len=32)
    assert softmax.head == "softmax"


# ---------------------------------------------------------------------------------------------------------------
# Resuming


def saved(config: RunConfig) -> dict:
    """The settings as they come back from a checkpoint's state.json."""
    return json.loads(json.dumps(settings(config)))


def test_resume_of_the_same_configuration(file):
    config = load(file)
    assert check_resume(saved(config), config, Path("c")) == []
    assert check_resume(saved(config), replace(config, resume="auto"), Path("c")) == []


def test_a_checkpoint_from_before_a_setting_existed_goes_on(file):
    config = load(file)
    older = {name: value for name, value in saved(config).items() if name != "model.activation_function"}
    assert check_resume(older, config, Path("c")) == []
    changed = load(file, "--model.activation_function", "gelu_pytorch_tanh")
    with pytest.raises(UserError, match=r"model\.activation_function: 'gelu' in the checkpoint"):
        check_resume(older, changed, Path("c"))


def test_resume_shows_what_may_differ(file):
    arguments = ["--optim.lr", "1e-3", "--train.steps", "200", "--train.micro_batch", "2", "--optim.betas", "[0, 0.9]"]
    now = load(file, *arguments, "--data.path", "data/moved", "--model.init_from", "gpt2")
    assert check_resume(saved(load(file)), now, Path("c")) == [
        "data.path: 'data/x' in the checkpoint, 'data/moved' now",
        "model.init_from: not set in the checkpoint, 'gpt2' now",
        "optim.betas: [0.9, 0.95] in the checkpoint, (0.0, 0.9) now",
        "optim.lr: 0.003 in the checkpoint, 0.001 now",
        "train.micro_batch: 4 in the checkpoint, 2 now",
        "train.steps: 100 in the checkpoint, 200 now",
    ]


@pytest.mark.parametrize(
    ("argument", "value", "line"),
    [
        ("model.n_layer", "3", "model.n_layer: 2 in the checkpoint, 3 now"),
        ("model.head.exponent", "14", "model.head.exponent: '2*sqrt_dim' in the checkpoint, 14.0 now"),
        ("model.tie_word_embeddings", "false", "model.tie_word_embeddings: True in the checkpoint, False now"),
        ("model.dropout", "0.1", "model.dropout: 0.0 in the checkpoint, 0.1 now"),
        ("data.seq_len", "64", "data.seq_len: 128 in the checkpoint, 64 now"),
        ("data.vocab_size", "9", "data.vocab_size: not set in the checkpoint, 9 now"),
        ("train.seed", "1", "train.seed: 1337 in the checkpoint, 1 now"),
        ("train.global_batch", "16", "train.global_batch: 8 in the checkpoint, 16 now"),
    ],
)
def test_resume_refuses_another_model_or_other_data(file, argument, value, line):
    now = load(file, f"--{argument}", value, "--optim.lr", "1e-3")
    with pytest.raises(UserError) as error:
        check_resume(saved(load(file)), now, Path("runs/x/checkpoints/step_0000005"))
    message = str(error.value)
    assert message.startswith("cannot go on from runs/x/checkpoints/step_0000005: the configuration differs in")
    assert f"\n  {line}\n" in message
    assert "optim.lr" not in message  # which is allowed


# ---------------------------------------------------------------------------------------------------------------
# Help


def test_help_lists_every_setting_with_its_docstring(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as done:
        load_run_config(["--help"])
    assert not done.value.code
    shown = capsys.readouterr().out
    for name in known_settings(RunConfig):
        assert f"--{name} " in shown, name
    text = " ".join(shown.split())
    assert "peak learning rate, reached after the warm-up. (type: float, default: 0.0006)" in text
    assert "n on the distance d: a number" in text
    assert "Args:" not in text and "<class" not in text


def test_print_config(file, capsys):
    with pytest.raises(SystemExit) as done:
        load(file, "--print_config")
    assert done.value.code in (0, None)
    assert tomllib.loads(capsys.readouterr().out)["optim"]["lr"] == 3e-3
