"""The doctor counts each fault in rows made to have it, after the preparation that trainers use."""

import io
import json

import pytest
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmalign.data.doctor import Limits, drop_overlong, examine, refuse, show_row
from llmalign.data.formats import load
from llmalign.data.text import tokenize_text
from llmalign.errors import UserError
from llmalign.trainers import prepare_groups, prepare_pairs

MERGED = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
THOUGHT = MERGED + "{% if add_generation_prompt %}<|im_start|>think{% endif %}"


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def report_on(write, tokenizer, rows, max_length=40, kind="pairs", **options):
    raw = load(write("a.jsonl", rows), kind=kind)
    make = prepare_groups if kind == "groups" else prepare_pairs
    prepared = make(raw, tokenizer, max_length=max_length)
    options.setdefault("eos_ids", [tokenizer.eos_token_id])
    return examine(raw, prepared, tokenizer, kind=kind, max_length=max_length, **options)


def counts(report) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (found.count, found.rows) for name, found in report.findings.items() if found.count}


def test_healthy_rows_have_no_faults(write, chatml):
    report = report_on(write, chatml, [pair("Why? ", "So.", "No."), pair("Who? ", "I.", "You.")])
    assert counts(report) == {} and report.problems() == [] and report.rows == report.prepared_rows == 2
    refuse(report)


def test_every_fault_of_text_pairs_is_counted_with_its_rows(write, chatml):
    rows = [
        pair("Why? ", "So.", "No."),
        pair("Why? ", "So.", "No."),  # 1: repeats row 0
        pair("Who? ", "I.", "I."),  # 2: identical
        pair("When? ", " \n", "Now."),  # 3: empty
        pair("p" * 40, "a", "b"),  # 4: the prompt fills max_length, one token a byte
        pair("p" * 30, "a" * 9, "b"),  # 5: 30 + 9 + EOS = 40, just fits
        pair("p" * 30, "a", "b" * 10),  # 6: 41 tokens
        pair("How? ", "So.<|im_end|><|im_end|>", "No."),  # 7: two ends
        pair("", "a", "b"),  # 8: no prompt
    ]
    report = report_on(write, chatml, rows)
    assert counts(report) == {
        "duplicates": (1, (1,)),
        "identical": (1, (2,)),
        "empty": (1, (3,)),
        "dropped": (1, (4,)),
        "truncated": (1, (6,)),
        "doubled_eos": (1, (7,)),
        "empty_prompt": (1, (8,)),
    }
    assert report.rows == 9 and report.prepared_rows == 8 and report.duplicate_prompts == 2  # rows 1 and 6
    assert report.lengths["prompt"] == (5, 5, 30, 30) and report.lengths["prompt + longest response"][-1] == 41


def test_chatml_replies_end_although_a_newline_follows(write, chatml, chat):
    row = {"prompt": chat("Hi"), "chosen": chat("A", first="assistant"), "rejected": chat("B", first="assistant")}
    assert counts(report_on(write, chatml, [row], max_length=200)) == {}
    prepared = prepare_pairs(Dataset.from_list([row]), chatml, max_length=200)
    assert chatml.decode(prepared[0]["chosen_ids"]) == "A<|im_end|>\n"


def test_a_turn_that_ends_with_another_token_has_no_end_of_text(write, chatml, chat):
    row = {"prompt": chat("Hi"), "chosen": chat("A", first="assistant"), "rejected": chat("B", first="assistant")}
    report = report_on(write, chatml, [row], max_length=200, eos_ids=[chatml.pad_token_id])
    assert counts(report) == {"missing_eos": (1, (0,))}
    both = report_on(write, chatml, [row], max_length=200, eos_ids=[chatml.pad_token_id, chatml.eos_token_id])
    assert counts(both) == {}


def test_a_template_that_writes_the_prompt_in_two_ways(write, chatml, chat, monkeypatch):
    monkeypatch.setattr(chatml, "chat_template", THOUGHT)
    row = {"prompt": chat("Hi"), "chosen": chat("A", first="assistant"), "rejected": chat("B", first="assistant")}
    assert counts(report_on(write, chatml, [row], max_length=200)) == {"not_prefix": (1, (0,))}
    monkeypatch.setattr(chatml, "chat_template", MERGED)
    assert counts(report_on(write, chatml, [row], max_length=200)) == {}


def test_tokens_that_merge_across_the_boundary_of_plain_text(write):
    vocabulary = {token: index for index, token in enumerate([*"abcdehnt|", "th"])}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="|")
    rows = [pair("at", "hen", "hat"), pair("ab", "c", "d")]
    report = report_on(write, tokenizer, rows)
    assert counts(report) == {"not_prefix": (1, (0,))}


def test_an_implicit_prompt(write, chatml, chat):
    rows = [{"chosen": chat("Hi", text), "rejected": chat("Hi", "B")} for text in ("A", "B", " ")]
    report = report_on(write, chatml, rows, max_length=200)
    assert counts(report) == {"identical": (1, (1,)), "empty": (1, (2,))}
    assert report.duplicate_prompts == 2
    text = [{"chosen": "Q? So.", "rejected": "Q? No."}, {"chosen": "Q? ", "rejected": "Q? No."}]
    assert counts(report_on(write, chatml, text)) == {"empty": (1, (1,))}


def test_groups_show_a_fault_where_any_completion_does(write, chatml):
    def group(prompt, *completions):
        rewards = [float(index) for index in range(len(completions))]
        return {"prompt": prompt, "completions": list(completions), "rewards": rewards}

    rows = [
        group("a? ", "x", "y", "z"),
        group("b? ", "x", "", "z"),
        group("c? ", "x", "x", "x"),
        group("d? ", "x", "y" * 40, "z" * 40),
        group("e? ", "x", "y<|im_end|><|im_end|>"),
        group("a? ", "x", "y", "z"),
        group("p" * 41, "x", "y"),
    ]
    report = report_on(write, chatml, rows, kind="groups")
    assert counts(report) == {
        "empty": (1, (1,)),
        "identical": (1, (2,)),
        "truncated": (1, (3,)),
        "doubled_eos": (1, (4,)),
        "duplicates": (1, (5,)),
        "dropped": (1, (6,)),
    }
    assert report.lengths["completions"][-1] == 41 and report.prepared_rows == 6


def test_more_rows_than_a_batch(write, chatml):
    rows = [pair(f"{index}? ", "x" * (50 if index in (1500, 2400) else 3), "y") for index in range(2500)]
    report = report_on(write, chatml, rows)
    assert counts(report) == {"truncated": (2, (1500, 2400))}


def test_text_rows(write, chatml, chat):
    def report(rows, **options):
        raw = load(write("a.jsonl", rows), kind="text")
        prepared = tokenize_text(raw, chatml)
        return examine(raw, prepared, chatml, kind="text", max_length=20, eos_ids=[chatml.eos_token_id], **options)

    rows = [{"text": "hello"}, {"text": "hello"}, {"text": " "}, {"text": "x" * 20}, {"text": "x<|im_end|><|im_end|>"}]
    found = report(rows)
    expected = {"duplicates": 1, "empty": 2, "truncated": 3, "doubled_eos": 4}
    assert counts(found) == {name: (1, (row_id,)) for name, row_id in expected.items()}
    assert list(found.lengths) == ["text"] and "not_prefix" not in found.findings
    assert counts(report([{"messages": chat("Hi", "A")}])) == {"truncated": (1, (0,))}


def test_text_ids_are_those_of_trl_s_own_preparation(write, chatml, chat, tiny_model, tmp_path):
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=None, report_to="none")
    for rows in (
        [{"text": "hello"}, {"text": "you<|im_end|>"}],
        [{"messages": chat("Hi", "A")}],
        [{"prompt": "Q ", "completion": "A"}],
        [{"prompt": chat("Hi"), "completion": chat("A", first="assistant")}],
    ):
        raw = load(write("a.jsonl", rows), kind="text")
        ours = tokenize_text(raw, chatml)
        trainer = SFTTrainer(tiny_model, args=options, train_dataset=raw, processing_class=chatml)
        assert ours["input_ids"][:] == trainer.train_dataset["input_ids"][:]
        labels = trainer.train_dataset["labels"][:]
        assert ours["completion_mask"][:] == [[int(label != -100) for label in row] for row in labels]


def test_a_stream_s_first_rows_are_examined_and_the_report_says_so(write, chatml):
    rows = [pair(f"{index}? ", "x" * (50 if index % 4 == 1 else 3), "y") for index in range(40)]
    rows[2]["prompt"] = "p" * 60
    raw = load(write("a.jsonl", rows), kind="pairs", streaming=True)
    prepared = prepare_pairs(raw, chatml, max_length=40)
    report = examine(
        raw, prepared, chatml, kind="pairs", max_length=40, eos_ids=[chatml.eos_token_id], stream_rows=8
    )  # fmt: skip
    assert report.rows == 8 and report.prepared_rows == 7
    assert {name: count for name, (count, _) in counts(report).items()} == {"truncated": 2, "dropped": 1}
    assert report.notes == ("a stream, of which the first 8 rows were examined.",)


def test_a_problem_is_one_sentence_with_count_limit_rows_and_way_out(write, chatml):
    rows = [pair(f"{index}? ", "x" * 50, "y") for index in range(9)] + [pair("z? ", "x", "y")]
    report = report_on(write, chatml, rows, limits=Limits(truncated=0.5))
    assert report.problems() == [
        "9 of 10 rows (90.0%) are longer than max_length 40 and lose the end of a response; `max_truncated` allows "
        "50.0%; row_id 0, 1, 2, 3, 4, ...; raise max_length, or leave such rows out with `overlong: drop`."
    ]
    with pytest.raises(UserError, match="^refused, 9 of 10 rows"):
        refuse(report)
    refuse(report, Limits(truncated=0.9))  # a share at its limit is allowed
    assert json.loads(json.dumps(report.as_dict()))["findings"]["truncated"] == {"count": 9, "rows": [0, 1, 2, 3, 4]}


def test_one_empty_response_is_refused_by_default(write, chatml):
    rows = [pair(f"{index}? ", "x", "y") for index in range(200)] + [pair("z? ", "", "y")]
    with pytest.raises(UserError, match="1 of 201 rows .0.5%. have an empty response; `max_empty` allows 0.0%; row_id"):
        refuse(report_on(write, chatml, rows))


@pytest.mark.parametrize("limits", [{"truncated": 1.5}, {"empty": -0.1}, {"dropped": float("nan")}])
def test_a_limit_is_a_share(limits):
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        Limits(**limits)


def test_when_every_row_is_dropped(write, chatml):
    report = report_on(write, chatml, [pair("p" * 50, "a", "b")])
    assert counts(report) == {"dropped": (1, (0,))} and report.prepared_rows == 0


def test_nothing_to_examine(chatml):
    empty = Dataset.from_dict({"row_id": [], "prompt": [], "chosen": [], "rejected": []})
    with pytest.raises(UserError, match="no rows"):
        examine(empty, empty, chatml, kind="pairs", max_length=4, eos_ids=[2])
    with pytest.raises(UserError, match="not 'images'"):
        examine(empty, empty, chatml, kind="images", max_length=4, eos_ids=[2])


def test_the_report_can_be_read(write, chatml):
    rows = [pair("Why? ", "So.", "No."), pair("Who? ", "x" * 50, "y")]
    console = Console(width=120, file=io.StringIO(), record=True)
    report_on(write, chatml, rows).render(console)
    text = console.export_text()
    assert "2 rows of pairs, 2 after preparation" in text and "prompt + longest response" in text
    line = next(line for line in text.splitlines() if "cut at max_length" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["cut at max_length", "1", "50.0%", "5.0%"]
    assert "- 1 of 2 rows (50.0%)" in text


def styles_of(console: Console, rows) -> dict[str, str]:
    """Text of each printed piece -> its style."""
    return {piece.text: str(piece.style) for line in rows for piece in line if piece.text.strip()}


def test_a_row_is_shown_token_by_token_with_its_mask(chatml):
    ids = chatml("Hi")["input_ids"]
    end = chatml.eos_token_id
    row = {"row_id": 7, "prompt_ids": ids, "chosen_ids": chatml("a b")["input_ids"] + [end], "rejected_ids": [end]}
    console = Console(width=200, file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor")
    show_row(row, chatml, console, max_length=4)
    html = console.export_html(inline_styles=True, clear=False)
    text = console.export_text()
    assert "row 7" in text and "prompt: 2 tokens, 0 with mask 1, 2 with mask 0\nH|i|" in text
    assert "chosen: 4 tokens, 2 with mask 1, 0 with mask 0, 2 cut off at max_length 4\na|␣|✂b|<|im_end|>|" in text
    assert "rejected: 1 tokens, 1 with mask 1, 0 with mask 0\n<|im_end|>|" in text
    struck = [part.split(">", 1)[1].split("<")[0] for part in html.split("<span") if "line-through" in part]
    assert struck == ["b", "&lt;|im_end|&gt;"]


def test_a_group_and_a_text_are_shown_too(chatml):
    console = Console(width=200, file=io.StringIO(), record=True)
    ids = chatml("a\n")["input_ids"]
    show_row({"row_id": 1, "prompt_ids": ids, "completion_ids": [ids, ids], "rewards": [0.5, -1.0]}, chatml, console)
    show_row({"row_id": 2, "input_ids": ids, "completion_mask": [0, 1]}, chatml, console)
    text = console.export_text()
    assert "completion 1, reward -1: 2 tokens, 2 with mask 1" in text and "a|⏎|" in text
    assert "text: 2 tokens, 1 with mask 1, 1 with mask 0" in text


def test_overlong_pairs_are_left_out(write, chatml, caplog):
    caplog.set_level("INFO")
    rows = [pair("p" * 30, "a" * 9, "b"), pair("p" * 30, "a", "b" * 10), pair("q", "a", "b")]
    raw = load(write("a.jsonl", rows), kind="pairs")
    kept = drop_overlong(prepare_pairs(raw, chatml, max_length=40), 40, "pairs")
    assert kept["row_id"][:] == [0, 2] and "Left out 1 of 3 rows that exceed max_length 40" in caplog.text
    stream = load(write("a.jsonl", rows), kind="pairs", streaming=True)
    left = drop_overlong(prepare_pairs(stream, chatml, max_length=40), 40, "pairs")
    assert [row["prompt"] for row in left] == [rows[0]["prompt"], rows[2]["prompt"]]
    with pytest.raises(UserError, match="None of the 3 rows fits max_length 2"):
        drop_overlong(prepare_pairs(raw, chatml, max_length=None), 2, "pairs")


def test_overlong_completions_leave_their_group_and_small_groups_go(write, chatml):
    rows = [
        {"prompt": "p", "completions": ["a", "b" * 40, "c"], "rewards": [1.0, 2.0, 3.0]},
        {"prompt": "q", "completions": ["a", "b" * 40], "rewards": [1.0, 2.0]},
        {"prompt": "r", "completions": ["a", "b"], "rewards": [5.0, 6.0]},
    ]
    raw = load(write("a.jsonl", rows), kind="groups")
    kept = drop_overlong(prepare_groups(raw, chatml, max_length=40), 40, "groups")
    assert kept["row_id"][:] == [0, 2] and kept["rewards"][:] == [[1.0, 3.0], [5.0, 6.0]]
    assert kept["completions"][:] == [["a", "c"], ["a", "b"]]
    assert [chatml.decode(ids) for ids in kept[0]["completion_ids"]] == ["a<|im_end|>", "c<|im_end|>"]


def test_overlong_texts_are_left_out(write, chatml):
    raw = load(write("a.jsonl", [{"text": "x" * 19}, {"text": "x" * 20}]), kind="text")
    assert drop_overlong(tokenize_text(raw, chatml), 20, "text")["row_id"][:] == [0]
    with pytest.raises(UserError, match="not of 'prompts'"):
        drop_overlong(raw, 20, "prompts")
