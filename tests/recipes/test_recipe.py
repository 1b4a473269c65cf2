"""Reading a recipe: types, overrides, and the sentence for whatever is not understood."""

from pathlib import Path

import pytest

from llmalign.errors import UserError
from llmalign.recipe import doctor_options, load_recipe, parse_overrides, read_yaml
from llmalign.values import parse_text

BASE = "method: rpo\nmodel_name_or_path: m\ndataset_name: pairs.jsonl\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write


def test_number_that_yaml_reads_as_text_becomes_a_number(write) -> None:
    config = load_recipe(write(BASE + "learning_rate: 5e-7\nmax_steps: 1e2\n")).training_config()
    assert config.learning_rate == 5e-7
    assert config.max_steps == 100 and isinstance(config.max_steps, int)


def test_no_is_read_as_the_strategy_and_not_as_a_boolean(write) -> None:
    assert load_recipe(write(BASE + "save_strategy: no\n")).training_config().save_strategy == "no"


def test_overrides_win_and_are_typed(write) -> None:
    recipe = load_recipe(
        write(BASE + "beta: 0.5\n"),
        [
            "--beta",
            "0.25",
            "--learning-rate=1e-6",
            "--use_peft",
            "--lora_target_modules",
            "[q_proj, v_proj]",
            "--where",
            "{a: 1}",
        ],
    )
    assert recipe.config["beta"] == 0.25
    assert recipe.config["learning_rate"] == 1e-6
    assert recipe.model["use_peft"] is True
    assert recipe.model["lora_target_modules"] == ["q_proj", "v_proj"]
    assert recipe.data.where == {"a": 1}


def test_text_fields_keep_what_was_typed(write) -> None:
    recipe = load_recipe(write(BASE), ["--model_revision", "0012", "--run_name", "1e3"])
    assert recipe.model["model_revision"] == "0012"
    assert recipe.config["run_name"] == "1e3"


def test_method_can_be_overridden(write) -> None:
    assert load_recipe(write(BASE), ["--method", "dpo"]).method.name == "dpo"


@pytest.mark.parametrize(
    ("extra", "words", "blamed"),
    [
        ("", ["--scoring", "fast"], "the command line: scoring must be one of"),
        ("scoring: fast\n", ["--beta", "0.1"], "{path}: scoring must be one of"),
        ("scoring: fast\n", ["--scoring", "quick"], "the command line: scoring must be one of .* got 'quick'"),
        ("", ["--method", "rdpo", "--flip_rate=0.5"], "the command line: flip_rate must be in"),
        ("", ["--load_in_4bit", "true"], "the command line: load_in_4bit and load_in_8bit"),
        ("load_in_8bit: true\n", [], "{path}: load_in_4bit and load_in_8bit"),
    ],
)
def test_a_bad_value_is_blamed_on_where_it_came_from(write, extra: str, words: list[str], blamed: str) -> None:
    path = write(BASE + extra)
    recipe = load_recipe(path, words)
    with pytest.raises(UserError, match="^" + blamed.format(path=path)):
        recipe.training_config()
        recipe.model_config()


def test_an_unknown_method_is_blamed_on_where_it_came_from(write) -> None:
    path = write(BASE)
    with pytest.raises(UserError, match="^the command line: unknown method 'rppo'"):
        load_recipe(path, ["--method", "rppo"])
    with pytest.raises(UserError, match=f"^{path}: unknown method 'ppo'"):
        load_recipe(write(BASE.replace("rpo", "ppo")))


def test_what_no_key_causes_is_blamed_on_no_file(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="^ACCELERATE_USE_CPU switches DeepSpeed off"):
        load_recipe(write(BASE)).training_config()


def test_limits_and_data_keys(write) -> None:
    recipe = load_recipe(write(BASE + "max_truncated: 0.2\noverlong: drop\nmax_rows: 7\nwhere: {split: train}\n"))
    assert recipe.limits.truncated == 0.2
    (source,) = recipe.data.train_sources()
    assert (source.path, source.max_rows, source.where) == ("pairs.jsonl", 7, {"split": "train"})


def test_evaluation_sets_by_name(write) -> None:
    text = BASE + "dataset_test_split: held\neval_datasets: {other: {path: b.jsonl, max_rows: 3}, plain: c.jsonl}\n"
    sets = load_recipe(write(text)).data.eval_sources()
    assert {name: found[0].path for name, found in sets.items()} == {
        "test": "pairs.jsonl",
        "other": "b.jsonl",
        "plain": "c.jsonl",
    }
    assert sets["test"][0].split == "held" and sets["other"][0].max_rows == 3


def test_another_dataset_on_the_command_line_replaces_the_whole_description(write) -> None:
    text = BASE + "columns: {chosen: a, rejected: b}\ndataset_test_split: test\nmax_rows: 9\n"
    data = load_recipe(write(text), ["--dataset_name", "mine.jsonl"]).data
    assert (data.dataset_name, data.columns, data.dataset_test_split, data.max_rows) == ("mine.jsonl", None, None, 9)
    same = load_recipe(write(text), ["--dataset_name", "pairs.jsonl"]).data
    assert same.columns == {"chosen": "a", "rejected": "b"}


def test_trust_remote_code_is_off_unless_asked_for(write) -> None:
    assert load_recipe(write(BASE)).training_config().trust_remote_code is False
    assert load_recipe(write(BASE + "trust_remote_code: true\n")).training_config().trust_remote_code is True


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("lerning_rate: 1.0", "unknown key `lerning_rate`; the nearest is `learning_rate`"),
        ("warmup_ratio: 0.1", "unknown key `warmup_ratio`; the nearest is `warmup_steps`"),
        ("dataset: x", "unknown key `dataset`; the nearest is `dataset_name`"),
        ("lora_rank: 8", "unknown key `lora_rank`; the nearest is `lora_r`"),
        ("rpo_alpha: 1.0", "`rpo_alpha` is not RPO's eta.*loss: irpo.*`alpha"),
        ("resume_from_checkpoint: x", "--resume auto"),
        ("beta: high", "`beta` takes a number, got 'high'"),
        ("beta: [0.1]", "`beta` takes a number"),
        ("beta: .nan", "`beta` takes a number, got nan"),
        ("max_steps: 1.5", "`max_steps` takes a whole number, got 1.5"),
        ("fp16: 1", "`fp16` takes true or false, got 1"),
        ("overlong: cut", "`overlong` takes keep or drop, got 'cut'"),
        ("columns: prompt", "`columns` takes a mapping"),
        ("dtype: float99", "`dtype` takes auto, bfloat16, float16, float32; got 'float99'"),
        ("max_truncated: 2", "`max_truncated` is a share"),
        ("seed: 1\nseed: 2", "`seed` is given twice"),
    ],
)
def test_what_is_not_understood_gets_its_sentence(write, extra: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(write(BASE + extra + "\n"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model_name_or_path: m\n", "names no method: set `method` to one of rpo"),
        ("method: rppo\n", "unknown method 'rppo'; the nearest is rpo"),
        ("method: {a: 1}\n", "unknown method {'a': 1}; the nearest is"),
        ("- a\n- b\n", "must hold `key: value` lines, found list"),
        ("method: [\n", "is not valid YAML"),
        ("1: x\n", "the key 1 is not text"),
        ("method: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(write, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(write(text))


def test_recipe_without_model_or_data(write) -> None:
    recipe = load_recipe(write("method: rpo\n"))
    with pytest.raises(UserError, match="names no model"):
        recipe.model_config()
    with pytest.raises(UserError, match="names no data"):
        recipe.data.train_sources()


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("eval_datasets: {train: b.jsonl}", "cannot be called `train`"),
        ("eval_datasets: {test: b.jsonl}\ndataset_test_split: test", "both name the set `test`"),
        ("eval_datasets: {held: {pth: b.jsonl}}", "pth"),
    ],
)
def test_evaluation_sets_that_cannot_be(write, extra: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(write(BASE + extra + "\n")).data.eval_sources()


def test_quantized_base_without_adapter(write) -> None:
    with pytest.raises(UserError, match="use_peft: true"):
        load_recipe(write(BASE + "load_in_4bit: true\n")).model_config()


def test_hub_keys_beside_a_list_are_refused(write) -> None:
    text = "method: rpo\nmodel_name_or_path: m\ndataset_name: [a.jsonl, b.jsonl]\nmax_rows: 5\n"
    with pytest.raises(UserError, match="`max_rows` stands beside a `dataset_name` that is a list"):
        load_recipe(write(text)).data.train_sources()


def test_missing_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(UserError, match="There is no recipe trainers/rpo/recipes.yaml.*trainers/rpo/recipe.yaml"):
        load_recipe("trainers/rpo/recipes.yaml")


def test_shipped_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("trainers/copg/smoke.yaml").method.name == "copg"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["beta", "1"], "'beta' is not understood"),
        (["--beta", "1", "--beta=2"], "--beta is given twice"),
        (["--"], "not understood"),
    ],
)
def test_command_lines_that_are_no_overrides(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_overrides(arguments)


def test_overrides_in_every_form() -> None:
    words = ["--a", "1", "--b=x=y", "--c", "--d", "-0.5"]
    assert parse_overrides(words) == {"a": "1", "b": "x=y", "c": "true", "d": "-0.5"}


def test_doctor_takes_keys_of_a_source_and_limits() -> None:
    source, limits = doctor_options("d.jsonl", ["--split", "test", "--columns", "{chosen: a}", "--max_empty", "0.5"])
    assert (source.path, source.split, source.columns, limits.empty) == ("d.jsonl", "test", {"chosen": "a"}, 0.5)
    with pytest.raises(UserError, match="unknown key `splitt`; the nearest is `split`"):
        doctor_options("d.jsonl", ["--splitt", "test"])


def test_yaml_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"method: \xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_yaml(path)


@pytest.mark.parametrize(("text", "expected"), [("1e-1", 0.1), ("0.2", 0.2), ("estimate", "estimate")])
def test_a_field_of_numbers_or_words_takes_both(text, expected):
    assert parse_text("flip_rate", text, float | str) == expected
