"""hgpt/run/config.py and settings.py: reading and writing, every refusal, and what a resumed run may change."""

import json
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hgpt.cli import run
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.run.config import HEAD, MODEL, HeadConfig, ModelConfig, RunConfig
from hgpt.run.settings import check_resume, flatten, known_settings, load_run_config, removed, settings, write_toml

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
exponent = "2*sqrt_dim"

[train]
steps = 100
global_batch = 8
micro_batch = 4

[optim]
lr = 3e-3
warmup_steps = 10
"""
OPTIONS = "model.head.distance_options"
LORENTZIAN = "model.head.distance=lorentzian model.head.distance_file=" + str(
    Path(__file__).parent.parent / "configs" / "distances" / "lorentzian.py"
)
SOFTMAX = "model.head.type=softmax model.head.exponent=null"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(CONFIG)
    return path


def load(path: Path, given: str = "") -> RunConfig:
    """The configuration of a file and settings of the command line, name=value between spaces."""
    return load_run_config(["--config", str(path), *(f"--{setting}" for setting in given.split())])


def test_file(file):
    config = load(file)
    written = flatten(tomllib.loads(CONFIG))
    assert len(written) == 12 and settings(config).items() >= written.items()
    assert isinstance(config.optim.lr, float)  # PyYAML would have read "3e-3" as a string
    assert (config.name, config.run_folder, config.optim.betas) == ("x", Path("runs/x"), (0.9, 0.95))


def test_the_later_of_two_values_wins_and_the_command_line_over_files(file, tmp_path):
    second = tmp_path / "second.toml"
    second.write_text("[train]\nsteps = 60\n")
    config = load_run_config(["--optim.lr", "1e-4", f"--config={file}", "--config", str(second), "--name", "y"])
    assert (config.optim.lr, config.name, config.train.steps, config.train.global_batch) == (1e-4, "y", 60, 8)
    assert load(file, "train.seed=1 train.seed=2").train.seed == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        *(("model.head.exponent", *pair) for pair in (("14", 14.0), ("2.77e1", 27.7), ("sqrt_dim", "sqrt_dim"))),
        *(("model.init_from", *pair) for pair in (("gpt2", "gpt2"), ("null", None))),
        *(("model.bias", *pair) for pair in (("true", True), ("yes", True), ("False", False))),
        *(("optim.lr", *pair) for pair in (("1", 1.0), (".5", 0.5))),
        ("optim.betas", "[0.8, 0.99]", (0.8, 0.99)),
        *(("log.trackers", *pair) for pair in (("[]", ()), ('["tensorboard", "wandb"]', ("tensorboard", "wandb")))),
        ("train.steps", "1_000", 1000),
        *(("name", text, text) for text in ("1e3", '"y"', "123", "null")),
        ("data.vocab_size", "null", None),
    ],
)
def test_values_on_the_command_line(file, name, text, expected):
    for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
        found = settings(load_run_config(["--config", str(file), *arguments])).get(name)
        assert found == expected and type(found) is type(expected)


def test_the_resolved_configuration_reads_back_to_the_same(file, tmp_path, capsys):
    for config in (
        load(file),
        load(file, "log.trackers=[] optim.betas=[0,0.999] optim.eps=1e-20 data.vocab_size=9"),
        load(file, f"{LORENTZIAN} {OPTIONS}.scale=0.5 model.head.learn_exponent=true"),
        load(file, SOFTMAX),
        # A Windows path and other characters that TOML wants escaped.
        replace(load(file), name="a b é", runs_dir='C:\\x41\\u1F "q" \t\x01\x7f\n😀'),
    ):
        write_toml(config, tmp_path / "resolved.toml")
        assert load(tmp_path / "resolved.toml") == config
    with pytest.raises(SystemExit, match="0"):
        load_run_config(["--config", str(file), "--print_config"])
    assert tomllib.loads(capsys.readouterr().out)["optim"]["lr"] == 3e-3


@pytest.mark.parametrize("where", ["toml", "earlier toml", "command line"])
def test_options_of_a_distance(file, where):
    if where == "command line":
        config = load(file, f"model.head.distance=minkowski {OPTIONS}.p=3")
    else:
        table = "p = 3" if where == "earlier toml" else "[model.head.distance_options]\np = 3"
        file.write_text(CONFIG.replace("[train]", f'distance = "minkowski"\n{table}\n\n[train]'))
        config = load(file)
        other = "model.head.distance=euclidean"
        for removal in (f"{OPTIONS}={{}}", f"{OPTIONS}=null", f"{OPTIONS}.p=null", "model.head.p=null"):
            assert load(file, f"{other} {removal}").model.head.distance_options is None
    hf = config.model.to_hf(vocab_size=100, seq_len=8)
    assert (hf.distance, hf.distance_options) == ("minkowski", {"p": 3.0})
    assert settings(config)[f"{OPTIONS}.p"] == 3


def test_settings_that_are_gone_are_read_if_they_say_what_holds_now(file):
    lines = ["optim.muon_momentum=0.95", "optim.decay_fraction=0.2", "checkpoint.on_interrupt=true", "log.energy=false"]
    lines += ["model.initializer_range=0.02", "model.pad_vocab_to_multiple_of=64", "train.loss_chunk=null"]
    assert load(file, " ".join(lines)) == load(file)
    assert load(file, "log.energy=true log.energy_country=DEU") == load(file, "log.energy_country=DEU")
    assert not removed({}).keys() & known_settings().keys()


def test_the_shape_of_the_model_comes_from_init_from_unless_it_is_given(file):
    file.write_text(CONFIG.replace("n_layer = 2\nn_head = 2\n", ""))
    asked = []

    def shape_of(*arguments: object) -> dict[str, int]:
        asked.append(arguments)
        return {"n_layer": 5, "n_head": 4, "n_embd": 32}

    arguments = ["--config", str(file), "--model.init_from", "gpt2"]
    model = load_run_config([*arguments, "--model.n_head", "8"], shape_of).model
    assert (model.n_layer, model.n_head, model.n_embd) == (5, 8, 64)
    assert asked == [("gpt2", "never", Path("runs/x"))]
    load_run_config([*arguments[:2], "--model.n_head", "8"], shape_of)
    assert len(asked) == 1


def test_help_lists_every_setting_with_its_description(capsys):
    with pytest.raises(SystemExit, match="0"):
        load_run_config(["--help"])
    shown = capsys.readouterr().out
    for name, setting in known_settings().items():
        assert f"--{name} " in shown and len(setting.doc) > 5, name
    assert "peak learning rate" in shown and "default 0.0006" in shown and "n on the distance d" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_fewer_steps_than_a_files_warm_up_lower_it(file, capsys):
    assert load(file, "train.steps=10").optim.warmup_steps == 1
    assert load(file, "train.steps=9").optim.warmup_steps == 0
    assert load(file, "train.steps=11").optim.warmup_steps == 10
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and all("optim.warmup_steps" in line and "train.steps" in line for line in printed)
    with pytest.raises(UserError, match=r"optim\.warmup_steps = 10 must"):
        load(file, "train.steps=10 optim.warmup_steps=10")
    file.write_text(file.read_text().replace("warmup_steps = 10", "warmup_steps = 100"))
    with pytest.raises(UserError, match=r"optim\.warmup_steps = 100 must"):  # nobody asked for fewer steps
        load(file)


# ---------------------------------------------------------------------------------------------------------------
# Refusing. Every check of config.py, settings.py and HGPTConfig: settings of the command line, of which the first is at
# fault, and what the message says besides its name.

# Of these, the message says the name and the value.
REFUSED_VALUES = """
train.steps= name= name=. name=.. name=a/b name=/a name=a/ data.seq_len=0 data.vocab_size=0 train.steps=-5
train.global_batch=0 train.micro_batch=0 train.label_smoothing=1 train.label_smoothing=-0.1 train.skip_non_finite=-1
train.distill_weight=1.5 train.distill_temperature=0 train.exponent_start=0 train.exponent_steps=-1
train.hang_timeout=0 train.seed=-1 train.seed=2147483648 optim.lr=0 optim.eps=0 optim.centre_lr_multiplier=-1
optim.final_norm_lr_multiplier=0 optim.metric_lr_multiplier=0 optim.min_lr=-1 optim.weight_decay=-1 optim.grad_clip=-1
optim.warmup_steps=-1 eval.every=0 eval.micro_batch=0 eval.diagnostic_windows=0 checkpoint.every=0
checkpoint.keep_last=-1 checkpoint.keep_every=-1 checkpoint.log_spaced_until=-8 log.every=0 train.loss_chunk=10
train.distance_memory=0 model.n_layer=0 model.n_head=0 model.n_embd=0 model.dropout=1 model.dropout=-0.1
model.dropout=nan model.activation_function=wave model.head.final_norm_gain=0 model.head.final_norm_gain=inf
model.head.centre_init_std=-1 model.head.exponent=0 model.head.exponent=-3 model.head.exponent=2*root
model.head.distance_file=none.py train.steps=1.5 train.steps=100.0 train.steps=1e3 train.steps=true train.steps=[1]
optim.lr=true optim.lr=nan optim.lr=inf optim.betas=[0.9] optim.algorithm=sgd
eval.diagnostic_windows=1000000000000 eval.micro_batch=1000000000000 train.global_batch=9223372036854775807
train.micro_batch=9223372036854775807 train.steps=9223372036854775808 train.distance_memory=1e-09
train.hang_timeout=1e+300 train.hang_timeout=1e-09 model.n_layer=1000000000 model.n_embd=4000000000 train.steps=many
train.precision=fp16 log.trackers=wandb model.head.type=soft model.head.radius=unigram model.final_norm=rms
model.initializer_range=0.1 model.pad_vocab_to_multiple_of=1 optim.decay_fraction=0.5 optim.muon_momentum=0.9
"""
WITHOUT_EFFECT_ON_SOFTMAX = f"""
model.head.learn_exponent=true model.head.distance=cosine model.head.distance_file=x.py model.head.p=3
{OPTIONS}.scale=2 optim.metric_lr_multiplier=2
"""
PATHS = ("name", "runs_dir", "resume", "data.path", "model.init_from")
REFUSED = [
    *((setting,) for setting in REFUSED_VALUES.split()),
    *((f"{setting} {SOFTMAX}", "no effect") for setting in WITHOUT_EFFECT_ON_SOFTMAX.split()),
    # Names and paths that no file can have; numbers and nesting without end.
    *((f"{name}=\udce4", "UTF-8", "\\udce4") for name in PATHS),
    *((f"{name}=a\0b", "UTF-8", "a\\x00b") for name in PATHS),
    (f"name={'a' * 300}", "200 bytes"),
    (f"name={'ä' * 101}", "200 bytes"),
    (f"train.steps={'9' * 5000}", "a whole number"),
    (f"train.steps={'[' * 5000}", "a whole number"),
    (f"optim.betas={'[' * 100}{']' * 100}", "a list of 2"),
    # No such setting (tests/test_cli.py has more that are suggested), or no such value.
    ("train.stepss=1", "train.steps"),
    ("train.seq_len=1", "data.seq_len"),
    (f"{OPTIONS}.a.b=3", "no setting"),
    ("zzz=1", "--help"),
    ("train.compile=1", "true or false"),
    ("optim.lr=abc", "a number"),
    ("optim.betas=0.9", "a list of 2, each a number"),
    ('optim.betas=[0.9,"x"]', "x"),
    ("optim.schedule=step", '"cosine", "linear", "constant", "trapezoidal"'),
    ('log.trackers=["aim"]', "aim"),
    (f"{OPTIONS}=3", "a table"),
    ("optim.min_lr=1", "optim.lr = 0.003"),
    ("optim.warmup_steps=100", "train.steps = 100"),
    ("optim.betas=[0.9,1]", "(0.9, 1.0)"),
    ("optim.betas=[-0.1,0.9]", "(-0.1, 0.9)"),
    ("checkpoint.keep_every=15 checkpoint.every=10", "checkpoint.every = 10"),
    ("checkpoint.keep_every=10 checkpoint.every=10 checkpoint.keep_last=0", "checkpoint.keep_last = 0"),
    # The model.
    ("model.n_embd=65", "n_head"),
    ("model.head.exponent=null", "required"),
    ("model.head.radius_init=mean model.head.radius=learned", '"unigram", "zero"'),
    ("model.head.radius_init=zero", 'model.head.radius = "none"', "no effect"),
    # The distance.
    ("model.head.distance=cosinus", "euclidean"),
    (f"{OPTIONS}={{'scale':2}}", "scale = 2"),
    ("model.head.p=3", OPTIONS, "p = 3"),
    (f"{OPTIONS}.p=0.5 model.head.distance=minkowski", "p must be"),
    (f"{OPTIONS}.temperature=0 model.head.distance=hamming", "temperature must be"),
    (f"{OPTIONS}.temperature=cold model.head.distance=hamming", "temperature = 'cold'"),
    (f"{OPTIONS}.metric=round model.head.distance=mahalanobis", "metric must be"),
    (f"{OPTIONS}.rank=4 model.head.distance=mahalanobis", "rank = 4", '"diagonal"'),
    (f"{OPTIONS}.rank=1000 {OPTIONS}.metric=low_rank model.head.distance=mahalanobis", "rank must", "64"),
    ("model.head.distance=minkowski", OPTIONS, "p is required"),
    (f"{OPTIONS}.metric=low_rank model.head.distance=mahalanobis", "rank is required"),
    (f"{OPTIONS}.scale=-1 {LORENTZIAN}", "scale must be positive"),
    (f"{OPTIONS}.unit=2 {LORENTZIAN}", "unit = 2", "which has scale"),
    # No effect with other settings.
    ("model.head.exponent=14 model.head.type=softmax", "no effect"),
    ("optim.metric_lr_multiplier=2", "no effect"),
    ("train.distill_weight=0.1", "no effect without train.distill_from"),
    ("train.distill_temperature=2", "no effect without train.distill_from"),
    ("train.exponent_start=4", "train.exponent_steps = 0"),
    ("train.exponent_steps=4", "train.exponent_start = 1.0"),
    ("train.exponent_steps=101 train.exponent_start=4", "0 to train.steps"),
    (f"train.exponent_steps=4 train.exponent_start=4 {SOFTMAX}", "softmax head has no exponent"),
    ("train.exponent_steps=4 train.exponent_start=4 model.head.learn_exponent=true", "n is learned"),
    # Gone.
    ("checkpoint.on_interrupt=false", "Ctrl-C"),
    ("log.wandb_project=p", "WANDB_PROJECT"),
    ("log.energy=true", "log.energy_country"),
    ("log.energy=false log.energy_country=DEU", "log.energy_country"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0][:60])
def test_refused(file, row, capsys):
    given, *words = row
    name, value = given.split()[0].split("=", 1)
    words = words or [value]
    assert run(lambda _: str(load(file, given)), []) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words if name.startswith(("model.head.p", OPTIONS)) else [name, *words]:
        assert word in message


def test_every_setting_has_a_row():
    """Settings that accept every value of their type have no row: whether something is on, and free text."""
    rows = {setting.split("=")[0] for row in REFUSED for setting in row[0].split()[:1]}
    free = {name for name, setting in known_settings().items() if setting.kind in (bool, str, str | None)}
    assert known_settings().keys() - free <= rows | {"model.head.distance_options"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("FILE steps=3", "steps=3"),
        ("FILE --train.steps", "--train.steps needs a value"),
        ("FILE --train.steps --optim.lr 1", "--train.steps needs a value"),
        ("FILE --optim 3", "optim is a section"),
        ("--config", "--config: expected one argument"),
        ("", "are required: name, data.path, train.steps.*--config configs/quickstart.toml"),
        ("--config tests", "--config tests: cannot read the file .*Is a directory"),
        ("--config configs/quickstrt.toml", r"did you mean configs/quickstart\.toml"),
        ("--config gpt2_small_softmx", r"did you mean configs/gpt2_small_softmax\.toml"),
    ],
)
def test_arguments_that_cannot_be_read(file, arguments, message):
    with pytest.raises(UserError, match=message):
        load_run_config(arguments.replace("FILE", f"--config {file}").split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((f"[train]\nsteps = {value}", r"train\.steps") for value in ("100.0", "true", "[1]", '"100"')),
        *((f"[train]\n{name} = 100", rf"train\.{name}\b") for name in ("step", "lr")),
        *((f"x{line}", "not valid TOML: ") for line in (f" = {'[' * 9999}", ".x" * 9999 + " = 1", f" = {'9' * 9999}")),
        *((line, "not valid TOML") for line in ("name = x", 'lr: 3\n"')),
        (f"[train]\nsteps = 0x{'f' * 9999}", "of 64 bits at most; got a number of thousands"),
        ("optim = 3", "optim is a section"),
        ("name = '\xff'", "cannot read"),
        ("[head]\ntype = 'softmax'", r"model\.head\.type"),
    ],
    ids=lambda text: text[:30],
)
def test_files_that_cannot_be_read(file, tmp_path, content, message):
    (tmp_path / "wrong.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load_run_config(["--config", str(file), "--config", str(tmp_path / "wrong.toml")])


def test_settings_of_the_model_are_the_fields_of_hgpt_config():
    known, its_fields = known_settings(), {entry.name: entry for entry in fields(HGPTConfig)}
    for name in [f"model.{key}" for key in MODEL] + [f"model.head.{key}" for key in HEAD]:
        entry = its_fields[name.split(".")[-1].replace("type", "head")]
        assert known[name].kind in (entry.type, entry.type | None)
        assert known[name].default in (entry.default, None)


def test_to_hf():
    head = HeadConfig(exponent="2*sqrt_dim", final_norm_gain=0.03, centre_init_std=0.5, learn_exponent=True)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "bias": True, "dropout": 0.1, "tie_word_embeddings": False}
    model = ModelConfig(**sizes, init_from="y", head=head)
    found = model.to_hf(vocab_size=100, seq_len=32, end_of_text=99)
    expected = {"n_positions": 32, "vocab_size": 100, "padded_vocab_size": 128, "head": "harmonic", "exponent": 16.0}
    expected |= {"learn_exponent": True, "distance": "euclidean", "distance_options": {}, "final_norm_gain": 0.03}
    expected |= {"centre_init_std": 0.5, "bos_token_id": 99, "eos_token_id": 99, "pad_token_id": 99}
    assert {name: getattr(found, name) for name in sizes | expected} == sizes | expected
    softmax = replace(model, head=HeadConfig(type="softmax", radius="learned", radius_init="zero"), final_norm="none")
    softmax = softmax.to_hf(vocab_size=100, seq_len=32)
    assert (softmax.head, softmax.final_norm, softmax.final_norm_gain) == ("softmax", "none", 1.0)
    assert softmax.radius == "learned"


# -------------------------------------------------------------------------------------------------------- Resuming


def saved(config: RunConfig, **changed: object) -> dict:
    """The settings as they come back from a checkpoint's state.json."""
    changes = {name.replace("__", "."): value for name, value in changed.items()}
    return json.loads(json.dumps(settings(config))) | changes


def test_resume_of_the_same_configuration(file):
    config = load(file)
    gone_now = {"optim__muon_momentum": 0.95, "model__initializer_range": 0.02, "log__energy": False}
    minkowski = load(file, f"model.head.distance=minkowski {OPTIONS}.p=3")
    older = {name: value for name, value in saved(config).items() if name != "model.activation_function"}
    for before, now in (
        (saved(config), config),
        (saved(config), replace(config, resume="auto")),
        (saved(config, **gone_now), config),
        (saved(config, model__head__distance="minkowski", model__head__p=3.0), minkowski),
        (older, config),  # a setting newer than the checkpoint had its default
    ):
        assert check_resume(before, now, Path("c")) == []
    with pytest.raises(UserError, match=r"model\.activation_function: 'gelu' in the checkpoint"):
        check_resume(older, load(file, "model.activation_function=gelu_pytorch_tanh"), Path("c"))


def test_resume_shows_what_may_differ(file):
    free = "optim.lr=1e-3 train.steps=200 train.micro_batch=2 optim.betas=[0,0.9] data.path=data/moved"
    now = load(file, f"{free} model.init_from=gpt2")
    assert check_resume(saved(load(file), optim__muon_momentum=0.9, train__loss_chunk=64), now, Path("c")) == [
        "data.path: 'data/x' in the checkpoint, 'data/moved' now",
        "model.init_from: not set in the checkpoint, 'gpt2' now",
        "optim.betas: [0.9, 0.95] in the checkpoint, [0.0, 0.9] now",
        "optim.lr: 0.003 in the checkpoint, 0.001 now",
        "optim.muon_momentum: 0.9 in the checkpoint, 0.95 now",
        "train.loss_chunk: 64 in the checkpoint, not set now",
        "train.micro_batch: 4 in the checkpoint, 2 now",
        "train.steps: 100 in the checkpoint, 200 now",
    ]


def test_resume_refuses_another_model_or_other_data(file):
    given = f"""data.seq_len=64 data.vocab_size=9 model.dropout=0.1 model.head.distance=minkowski {OPTIONS}.p=3
        model.head.exponent=14 model.n_layer=3 model.tie_word_embeddings=false optim.algorithm=muon
        train.global_batch=16 train.seed=1 optim.lr=1e-3"""
    with pytest.raises(UserError) as error:
        check_resume(saved(load(file)), load(file, given), Path("runs/x/checkpoints/step_0000005"))
    first, *lines, _ = str(error.value).splitlines()
    assert first.startswith("cannot resume runs/x/checkpoints/step_0000005")
    assert lines == [  # not optim.lr, which is allowed
        "  data.seq_len: 128 in the checkpoint, 64 now",
        "  data.vocab_size: not set in the checkpoint, 9 now",
        "  model.dropout: 0.0 in the checkpoint, 0.1 now",
        "  model.head.distance: not set in the checkpoint, 'minkowski' now",
        f"  {OPTIONS}.p: not set in the checkpoint, 3 now",
        "  model.head.exponent: '2*sqrt_dim' in the checkpoint, 14.0 now",
        "  model.n_layer: 2 in the checkpoint, 3 now",
        "  model.tie_word_embeddings: True in the checkpoint, False now",
        "  optim.algorithm: 'adamw' in the checkpoint, 'muon' now",
        "  train.global_batch: 8 in the checkpoint, 16 now",
        "  train.seed: 1337 in the checkpoint, 1 now",
    ]


def test_only_descriptions_need_docstring_parser(monkeypatch):
    """A checkout on a GPU machine trains without it."""
    known = known_settings()
    monkeypatch.setitem(sys.modules, "docstring_parser", None)
    bare = known_settings.__wrapped__()
    assert bare.keys() == known.keys() and known["name"].doc and not bare["name"].doc
