"""Configuration files, overrides, rules, and one-line error messages."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_mosa.commands.config import list_configurations
from megatron_mosa.config import (
    Config,
    check_plan,
    check_world_size,
    config_from_dict,
    config_to_dict,
    load_config,
    origins,
    padded_vocab_size,
    save_config,
)
from megatron_mosa.config.keys import Key, default_of
from megatron_mosa.config.render import difference, reference, resolved
from megatron_mosa.config.rules import COMMAND_LINE
from megatron_mosa.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


def test_the_reference_matches_the_schema_and_explains_every_choice() -> None:
    assert (CONFIGS / "reference.yaml").read_text() == reference()
    tree = yaml.safe_load(reference())
    for section in fields(Config()):
        for item in fields(getattr(Config(), section.name)):
            key = item.metadata["key"]
            assert tree[section.name].pop(item.name) == default_of(item)
            for choice in key.choices:
                assert ("null" if choice is None else str(choice)) in key.comment
        assert not tree[section.name]


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_sets_only_what_differs_from_the_defaults(file: Path) -> None:
    """Heads and sparsity may be set to their defaults, too, because readers look for them."""
    if file.name == "reference.yaml" or file.parent.name == "grids":
        return
    load_config(file)
    written = yaml.safe_load(file.read_text())
    written.pop("base", None)
    for section, values in written.items():
        for item in fields(getattr(Config(), section)):
            if item.name in values and item.name not in ("num_dense_heads", "sparsity"):
                assert values[item.name] != default_of(item), f"{section}.{item.name} is the default"


def test_origins_tell_file_command_line_and_default() -> None:
    found = origins(QUICKSTART, ["train.steps=7", "run.seed=1"])
    assert (found["train.steps"], found["run.seed"]) == ("command line", "command line")
    assert (found["model.num_layers"], found["train.apex"]) == (str(QUICKSTART), "default")
    text = resolved(load_config(QUICKSTART, ["train.steps=7"]), origins(QUICKSTART, ["train.steps=7"]))
    assert config_from_dict(yaml.safe_load(text)) == load_config(QUICKSTART, ["train.steps=7"])
    assert re.search(r"(?m)^  steps: 7 +# command line$", text)


@pytest.mark.parametrize("base", ["../second.yaml", "~/second.yaml"])
def test_a_configuration_overrides_another_one(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "more").mkdir()
    (tmp_path / "first.yaml").write_text(QUICKSTART.read_text())
    (tmp_path / "second.yaml").write_text("base: first.yaml\nrun: {name: second}\ntrain: {steps: 7}\n")
    last = tmp_path / "more" / "last.yaml"
    last.write_text(f"base: {base}\nrun: {{name: last}}\noptimizer: {{warmup_steps: 3}}\n")
    found = load_config(last, ["optimizer.beta2=0.9"])
    assert (found.run.name, found.train.steps, found.optimizer.warmup_steps) == ("last", 7, 3)
    assert found.model == load_config(QUICKSTART).model
    places = origins(last, ["optimizer.beta2=0.9"])
    assert places["run.name"] == str(last) and places["optimizer.beta2"] == COMMAND_LINE
    assert Path(places["train.steps"]).samefile(tmp_path / "second.yaml")
    assert Path(places["model.num_layers"]).samefile(tmp_path / "first.yaml")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("[a.yaml]", r"base must be the path of another YAML file, got \['a.yaml'\]"),
        ("none.yaml", "none.yaml' does not exist"),
        ("self.yaml", "base=self.yaml is based on this file itself; remove one base"),
        ("circle.yaml", "base=self.yaml is based on this file itself; remove one base"),
    ],
)
def test_a_base_that_cannot_be(tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "self.yaml").write_text(f"base: {base}\n")
    (tmp_path / "circle.yaml").write_text("base: self.yaml\n")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "self.yaml")


@pytest.mark.parametrize("name", ["paper/tiny", "paper/small", "paper/medium", "paper/large", "scale/1b", "scale/7b"])
def test_every_mosa_model_has_a_causal_sibling(name: str) -> None:
    first, second = (load_config(CONFIGS / f"{name}_mosa{end}.yaml") for end in ("", "_causal"))
    keys = [key for key, *_ in difference(first, second)]
    assert keys == ["run.name", "mosa.selection", "mosa.load_feedback"]
    assert (second.mosa.load_feedback, first.mosa.load_feedback) == (0.1, 0.0)


def test_the_difference_of_two_configurations() -> None:
    ours, theirs = (load_config(QUICKSTART, [f"train.skip_steps=[{steps}]", "run.seed=1"]) for steps in ("1, 2", ""))
    assert list(difference(ours, theirs)) == [("train.skip_steps", "[1, 2]", "[]")]


def test_overrides_win_and_are_typed() -> None:
    config = load_config(
        QUICKSTART,
        [
            "train.steps=7",
            "optimizer.learning_rate=1e-3",
            "data.sources=[a.txt, b.jsonl]",
            "train.stop_after_step=null",
        ],
    )
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.sources == ["a.txt", "b.jsonl"]
    assert config.train.stop_after_step is None
    assert config.model.hidden_size == 128


def test_a_configuration_that_is_written_reads_back_as_the_same(tmp_path: Path) -> None:
    """Also where a text looks like a number, a list or another value of the configuration."""
    texts = ["4e12345", "1e5", "-1.e+3", ".5e3", "1:30", "0x1f", "on", "null", "a, b", "# c", "[1]", "é", "a\\${b}"]
    texts += [r"\${x}", r"\\\${x}", r"\$\{", r"${run.name}\\"]
    for text in texts:
        overrides = ["mosa.sparsity=7.5", "optimizer.min_learning_rate=1e-5", f"data.tokenizer={text}"]
        config = load_config(QUICKSTART, overrides)
        config.data.sources = [text, config.data.tokenizer or "null"]
        save_config(config, tmp_path / "saved.yaml")
        (tmp_path / "shown.yaml").write_text(resolved(config, origins(QUICKSTART)), encoding="utf-8")
        for name in ("saved", "shown"):
            assert load_config(tmp_path / f"{name}.yaml") == config, text
        assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stps=3", ["train.stps", "did you mean 'steps'"]),
        ("trian.steps=3", ["'trian'", "did you mean 'train'"]),
        ("train.steps=abc", ["train.steps must be of type int, got 'abc'"]),
        ("train.steps=1.5", ["train.steps must be of type int, got 1.5"]),
        ("train.steps=0", ["train.steps must be at least 1 and at most 1000000000, got 0"]),
        ("mosa.sparsity=.nan", ["mosa.sparsity must be at least 1 and at most 16777216, got nan"]),
        ("mosa.sparsity=0.5", ["mosa.sparsity must be at least 1 and at most 16777216, got 0.5: a head selects"]),
        ("mosa.num_heads=15", ["mosa.num_heads=15", "[1]"]),
        ("model.num_dense_heads=3", ["model.num_dense_heads=3", "tensor_model_parallel_size=2"]),
        (
            "data.sequence_length=1",
            ["data.sequence_length must be at least 2 and at most 16777216, got 1: a MoSA head selects"],
        ),
        (
            "data.sequence_length=255",
            ["data.sequence_length=255", "sequence parallelism", "[1, 3, 5, 15, 17, 51, 85, 255]"],
        ),
        ("parallel.pipeline_model_parallel_size=2", ["size must be 1, got 2: pipeline parallelism is not implemented"]),
        ("parallel.context_parallel_size=2", ["size must be 1, got 2: context parallelism is not implemented"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage must be one of 0, 1, 2, 3, got 4"]),
        ("train.precision=bf61", ["train.precision must be one of fp32, bf16, got bf61", "did you mean 'bf16'"]),
        ("mosa.selection_scope=document", ["mosa.selection_scope=document", "model.attend_within_documents=true"]),
        (
            "mosa.selection=thresholds",
            ["mosa.selection must be one of expert", "did you mean 'threshold'"],
        ),
        ("mosa.threshold_ema=1.5", ["mosa.threshold_ema must be greater than 0 and at most 1, got 1.5"]),
        ("mosa.threshold_ema=0", ["mosa.threshold_ema must be greater than 0 and at most 1, got 0.0"]),
        ("mosa.threshold_warmup_steps=0", ["mosa.threshold_warmup_steps must be at least 1, got 0"]),
        ("mosa.load_feedback=-1", ["mosa.load_feedback must be at least 0 and at most 1000, got -1.0"]),
        ("mosa.load_feedback=0.1", ["mosa.load_feedback=0.1", "mosa.selection=expert_choice has none"]),
        ("mosa.load_feedback=.inf", ["mosa.load_feedback must be", "finite", "got inf"]),
        ("mosa.capacity_factor=0.9", ["mosa.capacity_factor must be at least 1 and at most 16777216, got 0.9: at 1"]),
        ("mosa.capacity_factor=.inf", ["mosa.capacity_factor must be", "finite", "got inf"]),
        ("mosa.selection_scope=documents", ["mosa.selection_scope must be one of sequence", "did you mean 'document'"]),
        ("model.restart_rotary=true", ["model.restart_rotary=true", "model.attend_within_documents=true"]),
        (
            "mosa.selection='threshold'",
            ["the value would keep its quotes; leave them out"],
        ),
        ('data.path="/x"', ["override 'data.path=\"/x\"'", "keep its quotes"]),
        ("model.local_window=8", ["model.local_window=8", "dense and MoSA heads have no window"]),
        ("model.fixed_stride=8", ["model.fixed_stride=8 has no fixed heads to apply to", "model.fixed_stride=null"]),
        ("model.fixed_stride=0", ["model.fixed_stride must be at least 1, got 0"]),
        ("model.routing_clusters=8", ["model.routing_clusters=8 has no Routing heads", "model.routing_clusters=null"]),
        (
            "model.routing_clusters=1",
            ["model.routing_clusters must be at least 2, got 1: one cluster takes all tokens"],
        ),
        ("model.routing_decay=1.1", ["model.routing_decay must be at least 0 and at most 1, got 1.1"]),
        ("model.num_sparse_heads=8", ["model.num_sparse_heads", "did you mean"]),
        ("train.apex=alway", ["train.apex must be one of auto", "got alway", "did you mean 'always'"]),
        (
            "mosa.backend=trition",
            ["be one of auto, naive, triton, got trition", "did you mean 'triton'"],
        ),
        (
            "train.micro_batch_size=3",
            [
                "train.global_batch_size=16 must be divisible by train.micro_batch_size=3; ",
                "set train.global_batch_size=15, or train.micro_batch_size=2 or 4",
            ],
        ),
        ("model.rotary_percent=1.1", ["model.rotary_percent must be at least 0 and at most 1, got 1.1"]),
        ("model.head_dim=31", ["model.head_dim must be even, got 31"]),
        ("model.ffn_hidden_size=255", ["model.ffn_hidden_size=255", "256"]),
        ("model.hidden_size=1000000000000", ["model.hidden_size must be at least 1 and at most 1048576, got 10000"]),
        ("data.num_workers=100000", ["data.num_workers must be at least 0 and at most 256, got 100000"]),
        ("optimizer.warmup_steps=-1", ["optimizer.warmup_steps must be at least 0, got -1"]),
        ("optimizer.beta2=1.0", ["optimizer.beta2 must be at least 0 and less than 1, got 1.0"]),
        ("optimizer.min_learning_rate=1.0", ["min_learning_rate=1.0", "exceeds"]),
        ("data.validation_fraction=1.0", ["data.validation_fraction must be greater than 0 and less than 1, got 1.0"]),
        ("data.sources=[]", ["data.sources is empty"]),
        ("run.name=a/b", ["run.name must contain only letters", "got 'a/b'"]),
        ("steps=3", ["steps=3", "section.key=value"]),
        ("train.steps", ["train.steps", "section.key=value"]),
        ("data.sources=[a", ["data.sources=[a", "not valid YAML"]),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_what_is_allowed(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "key",
    [
        f"{section}.{item.name}"
        for section in ("model", "mosa", "optimizer")
        for item in fields(getattr(Config(), section))
        if "float" in str(item.type)
    ],
)
def test_numbers_that_fp32_cannot_hold_are_too_large(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key} must be .*(at most|less than) .*, got 1e\+38"):
        load_config(QUICKSTART, [f"{key}=1e38"])


def test_unsupported_combinations_name_the_nearest_supported_one() -> None:
    for overrides, fix in (
        (["parallel.zero_stage=0", "train.precision=bf16"], "parallel.zero_stage=1, or train.precision=fp32"),
        (["parallel.zero_stage=0", "parallel.offload_optimizer=true"], "set parallel.zero_stage=1"),
        (["parallel.zero_stage=3", "train.apex=always"], "set train.apex=auto"),
        (
            ["parallel.offload_optimizer=true", "train.apex=always"],
            "offload_optimizer=true .*set train.apex=auto",
        ),
    ):
        with pytest.raises(UserError, match=fix):
            load_config(QUICKSTART, overrides)
    for stage in (0, 1, 2, 3):
        load_config(QUICKSTART, [f"parallel.zero_stage={stage}"])


def test_fixed_heads_see_more_than_one_token() -> None:
    load_config(QUICKSTART, ["model.num_fixed_heads=2", "model.fixed_stride=255"])
    message = r"^model.fixed_stride=256 leaves fixed heads only token 0 of data.sequence_length=256; set model.fixed_st"
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, ["model.num_fixed_heads=2", "model.fixed_stride=256"])
    with pytest.raises(UserError, match=r"^mosa.sparsity=300 leaves fixed heads"):
        load_config(QUICKSTART, ["model.num_fixed_heads=2", "mosa.sparsity=300"])


def test_clusters_of_routing_heads_have_at_least_two_tokens() -> None:
    heads = "model.num_routing_heads=2"
    load_config(QUICKSTART, [heads, "model.routing_clusters=128"])
    load_config(QUICKSTART, [heads, "mosa.sparsity=2.5"])
    message = (
        r"^model.routing_clusters=129 leaves each cluster of Routing heads fewer than 2 of data.sequence_length=256 "
        r"tokens; set model.routing_clusters to at most 128$"
    )
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, [heads, "model.routing_clusters=129"])
    with pytest.raises(UserError, match=r"^mosa.sparsity=200 leaves each cluster"):
        load_config(QUICKSTART, [heads, "mosa.sparsity=200"])
    message = r"^mosa.sparsity=1.5 gives Routing heads 1 cluster; set model.routing_clusters to at least 2$"
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, [heads, "mosa.sparsity=1.5"])
    message = r"^model.num_routing_heads=3 is not divisible by parallel.tensor_model_parallel_size=2"
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, ["model.num_routing_heads=3", "parallel.tensor_model_parallel_size=2"])


def test_the_gate_needs_heads_without_one() -> None:
    for heads in ("model.num_dense_heads=2", "model.num_local_heads=2"):
        load_config(QUICKSTART, ["model.num_dense_heads=0", heads, "model.attention_gate=true"])
    message = (
        r"^model.attention_gate=true gates dense and local heads, but there are none: MoSA heads are gated by their"
    )
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, ["model.num_dense_heads=0", "model.attention_gate=true"])


def test_document_scope_needs_mosa_heads() -> None:
    documents = ["model.attend_within_documents=true", "mosa.selection_scope=document", "model.restart_rotary=true"]
    load_config(QUICKSTART, documents)
    with pytest.raises(UserError, match=r"mosa.num_heads=0.*set mosa.selection_scope=sequence"):
        load_config(QUICKSTART, [*documents, "mosa.num_heads=0"])


def test_options_that_threshold_selection_does_not_support() -> None:
    by_threshold = ["mosa.selection=threshold", "model.attend_within_documents=true"]
    load_config(QUICKSTART, by_threshold)
    load_config(QUICKSTART, [*by_threshold, "mosa.num_heads=0"])  # the dense model to compare with
    for override in ("mosa.selection_scope=document", "mosa.include_first_token=false"):
        key, _, value = override.partition("=")
        with pytest.raises(
            UserError, match=rf"{override} is not supported with mosa.selection=threshold.*; set {key}=(?!{value})"
        ):
            load_config(QUICKSTART, [*by_threshold, override])


def test_token_choice_leaves_each_token_a_head() -> None:
    by_token = ["mosa.selection=token_choice", "mosa.num_heads=8"]
    assert load_config(QUICKSTART, [*by_token, "mosa.sparsity=3"]).heads_per_token == 3
    assert load_config(QUICKSTART, [*by_token, "mosa.sparsity=15"]).heads_per_token == 1
    with pytest.raises(
        UserError, match=r"^mosa.sparsity=16 leaves each token .* = 0 of mosa.num_heads=8 heads to choo"
    ):
        load_config(QUICKSTART, [*by_token, "mosa.sparsity=16"])
    for override in ("mosa.include_first_token=false", "mosa.selection_scope=document"):
        within = "model.attend_within_documents=true"
        with pytest.raises(UserError, match=rf"^{override} is not supported with mosa.selection=token_choice"):
            load_config(QUICKSTART, [*by_token, within, "mosa.sparsity=4", override])
    with pytest.raises(
        UserError, match="mosa.load_feedback=0.1 moves thresholds, but mosa.selection=token_choice has no"
    ):
        load_config(QUICKSTART, [*by_token, "mosa.sparsity=4", "mosa.load_feedback=0.1"])


def test_mistakes_in_files(tmp_path: Path) -> None:
    cases = {
        "missing.yaml": (None, "does not exist"),
        "broken.yaml": ("train: [", "is not valid YAML"),
        "list.yaml": ("- 1\n", "must hold keys"),
        "scalar.yaml": ("train: 3\n", "section 'train' must hold keys"),
        "short.yaml": ("run: {name: a}\n", "model.num_layers is missing"),
        "reference.yaml": (reference(), "run.name is missing"),
    }
    for name, (text, message) in cases.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_config(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_world_sizes() -> None:
    config = load_config(QUICKSTART)
    assert [check_world_size(config, world) for world in (2, 4)] == [1, 2]
    with pytest.raises(UserError, match="world size 3 is not divisible by parallel.tensor_model_parallel_size=2"):
        check_world_size(config, 3)
    with pytest.raises(UserError, match="the world size must be at least 1, got 0"):
        check_world_size(config, 0)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "product", "fixes"),
    [
        (64, 8, 32, "8 x 32 data-parallel ranks = 256", "train.global_batch_size=256, or train.micro_batch_size=2"),
        (16, 4, 3, "4 x 3 data-parallel ranks = 12", "train.global_batch_size=12"),
        (
            1000,
            7,
            5,
            "7 x 5 data-parallel ranks = 35",
            "train.global_batch_size=1015, or train.micro_batch_size=5 or 8",
        ),
        (64, 9, 32, "9 x 32 data-parallel ranks = 288", "train.global_batch_size=288, or train.micro_batch_size=2"),
        (7, 2, 1, "2", "train.global_batch_size=8, or train.micro_batch_size=1 or 7"),
    ],
)
def test_an_indivisible_batch_size_names_sizes_that_divide(
    batch: int, micro: int, ranks: int, product: str, fixes: str
) -> None:
    sizes = [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"]
    with pytest.raises(UserError) as caught:
        check_world_size(load_config(QUICKSTART, sizes, checks_batches=False), 2 * ranks)  # tensor-parallel size 2
    assert str(caught.value) == f"{sizes[0]} must be divisible by train.micro_batch_size={product}; set {fixes}"
    for fix in fixes.split(", or "):
        key, _, values = fix.partition("=")
        for value in values.split(" or "):
            check_world_size(load_config(QUICKSTART, [*sizes, f"{key}={value}"], checks_batches=False), 2 * ranks)


def test_the_vocabulary_is_padded_independently_of_the_layout() -> None:
    assert [padded_vocab_size(size, 128) for size in (1, 128, 129)] == [128, 128, 256]


@pytest.mark.parametrize("name", ["quickstart", "first_gpu_run"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_first_configurations_fit_1_to_8_processes(name: str, world: int) -> None:
    overrides = ["parallel.tensor_model_parallel_size=1"] if world == 1 else []  # as launch/torchrun/local.sh does
    check_world_size(load_config(QUICKSTART.parent / f"{name}.yaml", overrides), world)


@pytest.mark.parametrize(
    ("override", "value"), [("007", "007"), ("on", "on"), ("no", "no"), ("1.5", "1.5"), ("null_", "null_")]
)
def test_text_values_are_kept_as_typed(override: str, value: str) -> None:
    assert load_config(QUICKSTART, [f"run.name={override}"]).run.name == value
    assert load_config(QUICKSTART, [f"data.tokenizer={override}"]).data.tokenizer == value


@pytest.mark.parametrize(
    "override",
    [
        "run.name=2001-13-45/",
        "train.steps=!!int abc",
        "mosa.sparsity=${foo}",
        "data.sources=[[a]]",
        'data.sources=[""]',
        "data.sources=[1]",
        "run.name=a\0b",
        "run.seed=99999999999999999999",
        "mosa.include_first_token=2",
        "train.steps=true",
        "train.steps=010x",
        "run.directory=~nobody_of_that_name/x",
    ],
)
def test_strange_values_are_rejected_in_one_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    assert override.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_duplicate_key_in_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(QUICKSTART.read_text() + "run: {name: again}\n")
    with pytest.raises(UserError, match="duplicate key"):
        load_config(tmp_path / "twice.yaml")


def test_the_home_directory_is_expanded() -> None:
    config = load_config(QUICKSTART, ["data.path=~/text", "run.directory=~/runs"])
    assert config.data.path == str(Path.home() / "text") and config.run.directory == str(Path.home() / "runs")


def test_paths_that_the_locale_cannot_spell_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    with pytest.raises(UserError, match=r"^data\.path=/天地 cannot be the path of a file in this locale"):
        load_config(QUICKSTART, ["data.path=/天地"])


def test_bounds_without_a_lower_one_and_of_lists() -> None:
    assert Key("meaning", at_most=5).interval() == "<= 5" and Key("meaning", below=5).interval() == "< 5"
    assert Key("meaning", at_least=1).error_message("a.b", [3, 0]) == "a.b must be at least 1, got [3, 0]"
    assert Key("meaning", at_least=1).error_message("a.b", [3, 1]) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=10"], None),  # a trial
        (
            ["train.steps=10", "optimizer.warmup_steps=11"],
            "optimizer.warmup_steps must be at most train.steps=10, got 11: the learning rate would",
        ),
        (["optimizer.warmup_steps=201"], "optimizer.warmup_steps must be at most train.steps=200, got 201"),
        (["train.stop_after_step=201"], "train.stop_after_step must be at most train.steps=200, got 201; lower it"),
        (["train.steps=1000000000"], r"are 16,000,000,000 samples, but one shuffled pass holds at most 2,147,483,647"),
        (["train.steps=1000000000", "data.index_samples=1000"], None),
        (["train.steps=20", "train.stop_after_step=20"], None),
        (["logging.wandb_project=team/llm"], "logging.wandb_project must have at most 128 characters and none of / "),
        ([f"logging.wandb_project={'x' * 129}"], "logging.wandb_project must have at most 128 characters"),
        ([f"logging.wandb_project={'x' * 128}"], None),
    ],
)
def test_plans_without_sense_are_refused_before_a_run(overrides: list[str], message: str | None) -> None:
    config = load_config(QUICKSTART, overrides)  # a checkpoint may record them
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_plan(config, origins(QUICKSTART, overrides))


def test_the_list_has_grids_and_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("train: {stepz: 3}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "quick.yaml").write_text(f"base: {QUICKSTART}\n")
    (tmp_path / "grid.yaml").write_text("members: {dense: {}, other: {}}")
    list_configurations(tmp_path)
    broken, quick, grid = capsys.readouterr().out.splitlines()
    assert "cannot be used: unknown key 'train.stepz' (did you mean 'steps'?)" in broken
    assert "deep/quick.yaml  4 layers of width 128" in quick
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "again").symlink_to(tmp_path)  # a loop
    (tmp_path / "linked" / "elsewhere").symlink_to(tmp_path / "deep")
    (tmp_path / "deep" / "quick.yaml").rename(tmp_path / "deep" / "quick.yml")
    list_configurations(tmp_path / "linked" / "elsewhere")
    assert "elsewhere/quick.yml  4 layers of width 128" in capsys.readouterr().out
    list_configurations(tmp_path / "linked")
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert grid == f"{tmp_path}/grid.yaml        grid of dense, other: mosa isoflop run {tmp_path}/grid.yaml"
