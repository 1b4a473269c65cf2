"""Columns are mapped and every value is checked; a fault names the file, the row and the column."""

import json

import pytest

from llmalign.data.formats import load
from llmalign.errors import UserError

GOOD = {"prompt": "Name a fruit. ", "chosen": "An apple.", "rejected": "A brick."}


def refusal(write, rows, kind="pairs", **options) -> str:
    path = write("a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load({"path": path, **options}, kind=kind)
    assert "\n" not in str(caught.value) and "a.jsonl" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"chosen": 3}, "line 2: 'chosen' must be text or a list of messages, not int 3"),
        ({"chosen": None}, "line 2: 'chosen' is null"),
        ({"rejected": [{"role": "assistant", "content": "x"}]}, "line 2: 'rejected' is a list, but the rest"),
        ({"flipped": True}, "line 2: has 'flipped', which the first row lacks"),
        ({"ref_chosen_logps": -1.0}, "line 2: has 'ref_chosen_logps', which the first row lacks"),
    ],
)
def test_a_wrong_value_of_a_pair(write, change, words):
    assert words in refusal(write, [GOOD, GOOD | change])


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_missing_column_is_named_with_those_there_are(write, name):
    lacking = {key: value for key, value in GOOD.items() if key != name}
    assert f"line 1: has no '{name}'; it has: {', '.join(lacking)}" in refusal(write, [lacking])
    assert f"line 2: has no '{name}'" in refusal(write, [GOOD, lacking])


@pytest.mark.parametrize(
    "value, words",
    [(float("nan"), "is nan"), (float("inf"), "is inf"), ("low", "a number, not str 'low'"), (None, "not null")],
)
def test_log_probs_are_finite_numbers(write, value, words):
    rows = [GOOD | {"ref_chosen_logps": -1.0}, GOOD | {"ref_chosen_logps": value}]
    said = refusal(write, rows)
    assert "line 2: 'ref_chosen_logps'" in said and words in said


def test_extras_are_kept_with_their_types_and_others_dropped(write):
    row = GOOD | {"flipped": True, "ref_chosen_logps": -3, "base": "A pear.", "source": "me"}
    found = load(write("a.jsonl", [row]), kind="pairs")
    assert found[0] == {"row_id": 0, **GOOD, "base": "A pear.", "flipped": True, "ref_chosen_logps": -3.0}
    assert found.features["flipped"].dtype == "bool" and found.features["ref_chosen_logps"].dtype == "float64"


def test_a_column_of_numbers_is_kept_by_name(write):
    path = write("a.jsonl", [GOOD | {"margin": 1}, GOOD | {"margin": -0.5}])
    assert load(path, kind="pairs", keep=["margin"])["margin"][:] == [1.0, -0.5]
    with pytest.raises(UserError, match="has no 'gap'"):
        load(path, kind="pairs", keep=["gap"])


@pytest.mark.parametrize(
    "message, words",
    [
        ("hello", "message 1 of 'chosen' must have `role` and `content`, not be str 'hello'"),
        ({"from": "gpt", "value": "x"}, "it has: from, value"),
        ({"role": "gpt", "content": "x"}, "has the role str 'gpt'; known are: system"),
        ({"role": "assistant", "content": None}, "must have text as its content, not null"),
        ({"role": "assistant", "content": [{"type": "text", "text": "x"}]}, "must have text as its content, not list"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "has 'tool_calls', which is not"),
        ({"role": "user", "content": "x"}, "'chosen' ends with a message of the role 'user'"),
    ],
)
def test_malformed_messages(write, chat, message, words):
    good = {"prompt": chat("Hi"), "chosen": chat("A", first="assistant"), "rejected": chat("B", first="assistant")}
    assert "line 2: " in (said := refusal(write, [good, good | {"chosen": [message]}])) and words in said


def test_conversations_keep_role_and_content_alone(write, chat):
    noted = [{"role": "assistant", "content": "A", "weight": 1}]
    row = {"prompt": chat("Hi"), "chosen": noted, "rejected": chat("B", first="assistant")}
    assert load(write("a.jsonl", [row]), kind="pairs")[0]["chosen"] == chat("A", first="assistant")


def test_text_and_conversations_do_not_mix(write, chat):
    talk = {"prompt": chat("Hi"), "chosen": chat("A", first="assistant"), "rejected": chat("B", first="assistant")}
    assert "line 2: 'prompt' is a list, but the rest of the data are plain text" in refusal(write, [GOOD, talk])
    assert "line 2: 'prompt' is text, but the rest of the data are conversations" in refusal(write, [talk, GOOD])
    assert "conversation without messages" in refusal(write, [talk, talk | {"prompt": []}])


def test_an_implicit_prompt_is_a_shared_beginning(write, chat):
    talk = {"chosen": chat("Hi", "A"), "rejected": chat("Hi", "B")}
    assert load(write("a.jsonl", [talk]), kind="pairs")[0] == {"row_id": 0, **talk}
    text = {"chosen": "Q: why? A: so.", "rejected": "Q: why? A: no."}
    assert load(write("b.jsonl", [text]), kind="pairs")[0] == {"row_id": 0, **text}
    alone = chat("A", first="assistant")
    for first, second in ((chat("Hi", "A"), chat("Ho", "B")), (alone, alone)):
        assert "do not begin with the same message" in refusal(write, [talk, {"chosen": first, "rejected": second}])
    assert "do not begin with the same words" in refusal(write, [text, {"chosen": "Yes.", "rejected": "No."}])


def test_a_prompt_repeated_in_the_responses_is_refused_with_the_way_out(write, chat):
    row = {"prompt": chat("Hi"), "chosen": chat("Hi", "A"), "rejected": chat("Hi", "B")}
    assert "`columns: {prompt: null}`" in refusal(write, [row])
    found = load({"path": write("a.jsonl", [row]), "columns": {"prompt": None}}, kind="pairs")
    assert found.column_names == ["row_id", "chosen", "rejected"]


def test_columns_map_names_paths_and_lists(write):
    row = {"q": "Why? ", "answers": {"best": {"text": "So."}, "worst": {"text": "No."}}}
    columns = {"prompt": "q", "chosen": "answers.best.text", "rejected": "answers.worst.text"}
    found = load({"path": write("a.jsonl", [row]), "columns": columns}, kind="pairs")
    assert found[0] == {"row_id": 0, "prompt": "Why? ", "chosen": "So.", "rejected": "No."}
    assert "has no 'answers.best.txt'" in refusal(
        write, [row], columns=columns | {"chosen": "answers.best.txt"}
    )  # fmt: skip


def test_an_unknown_target_of_columns_names_the_nearest(write):
    with pytest.raises(UserError, match="unknown key 'choosen' .did you mean 'chosen'"):
        load({"path": write("a.jsonl", [GOOD]), "columns": {"choosen": "chosen"}}, kind="pairs")


def test_groups_from_nested_outputs_and_from_pairs_of_columns(write):
    nested = {"prompt": "p", "outputs": [{"output": "a", "score": 1}, {"output": "b", "score": 0.5}]}
    columns = {"completions": "outputs.output", "rewards": "outputs.score"}
    expected = {"row_id": 0, "prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 0.5]}
    assert load({"path": write("a.jsonl", [nested]), "columns": columns}, kind="groups")[0] == expected
    flat = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 0.5}
    columns = {"completions": ["chosen", "rejected"], "rewards": ["chosen_score", "rejected_score"]}
    assert load({"path": write("b.jsonl", [flat]), "columns": columns}, kind="groups")[0] == expected


def test_groups_split_the_shared_conversation_out(write, chat):
    row = {"completions": [chat("Hi", "A"), chat("Hi", "B")], "rewards": [0, 1]}
    found = load(write("a.jsonl", [row]), kind="groups")[0]
    assert found["prompt"] == chat("Hi")
    assert found["completions"] == [chat("A", first="assistant"), chat("B", first="assistant")]
    other = {"completions": [chat("Hi", "A"), chat("Ho", "B")], "rewards": [0, 1]}
    assert "line 2: has no 'prompt', and its completions do not begin" in refusal(write, [row, other], kind="groups")
    text = {"completions": ["a", "b"], "rewards": [0, 1]}
    assert "has no 'prompt'" in refusal(write, [text], kind="groups")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rewards": [1.0]}, "has 2 completions and 1 rewards"),
        ({"rewards": [1.0, float("nan")]}, "'rewards[1]' is nan"),
        ({"rewards": [float("-inf"), 0.0]}, "'rewards[0]' is -inf"),
        ({"rewards": [1.0, True]}, "'rewards[1]' must be a number, not bool True"),
        ({"rewards": 1.0}, "'rewards' must be a list, not float 1.0"),
        ({"completions": "a"}, "'completions' must be a list, not str 'a'"),
        ({"completions": ["a", 7]}, "'completions[1]' must be text or a list of messages, not int 7"),
    ],
)
def test_a_wrong_value_of_a_group(write, change, words):
    good = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
    said = refusal(write, [good, good | change], kind="groups")
    assert "line 2: " in said and words in said


def test_groups_of_fewer_than_two_are_left_out_and_counted(write, caplog):
    good = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
    short = [{"prompt": "q", "completions": ["a"], "rewards": [1.0]}, {"prompt": "r", "completions": [], "rewards": []}]
    path = write("a.jsonl", [good, *short, good])
    for _ in range(2):  # also when the rows come from the cache
        caplog.clear()
        assert load(path, kind="groups")["row_id"][:] == [0, 3]
        assert "left out 2 of 4 groups, which have fewer than two completions; the first is row 1" in caplog.text
    with pytest.raises(UserError, match="no group of two or more"):
        load(write("b.jsonl", short[:1]), kind="groups")


def test_csv_numbers_flags_and_lists(write):
    text = "prompt,chosen,rejected,flipped,ref_chosen_logps,margin\n[1] ,a,b,true,-1.5,2\nq,[a],b,0,-2,-3\n"
    found = load(write("a.csv", text), kind="pairs", keep=["margin"])
    assert found["chosen"][:] == ["a", "[a]"] and found["flipped"][:] == [True, False]
    assert found["ref_chosen_logps"][:] == [-1.5, -2.0] and found["margin"][:] == [2.0, -3.0]
    groups = 'prompt,completions,rewards\np,"[""a"", ""b""]","[1, 0.5]"\n'
    assert load(write("g.csv", groups), kind="groups")[0]["rewards"] == [1.0, 0.5]
    flat = "prompt,a,b,x,y\np,a1,b1,1,2\n"
    columns = {"completions": ["a", "b"], "rewards": ["x", "y"]}
    found = load({"path": write("f.csv", flat), "columns": columns}, kind="groups")
    assert found[0]["completions"] == ["a1", "b1"] and found[0]["rewards"] == [1.0, 2.0]
    cell = json.dumps([{"t": "a", "s": 1}, {"t": "b", "s": 2}]).replace('"', '""')
    columns = {"completions": "outputs.t", "rewards": "outputs.s"}
    found = load({"path": write("n.csv", f'prompt,outputs\np,"{cell}"\n'), "columns": columns}, kind="groups")
    assert found[0]["completions"] == ["a", "b"] and found[0]["rewards"] == [1.0, 2.0]


@pytest.mark.parametrize(
    "row, words",
    [
        ('p,"[""a"", ""b""]","[1, NaN]"', "'rewards[1]' is nan"),
        ('p,"[""a"", ""b""]","[1, 2"', "'rewards' must be JSON"),
        ("p,__import__('os').getcwd(),\"[1, 2]\"", "'completions' must be JSON"),
    ],
)
def test_csv_cells_are_read_as_json_and_nothing_else(write, row, words):
    with pytest.raises(UserError, match="line 2: ") as caught:
        load(write("a.csv", f"prompt,completions,rewards\n{row}\n"), kind="groups")
    assert words in str(caught.value)


def test_csv_numbers_that_are_none(write):
    with pytest.raises(UserError, match="line 3: 'ref_chosen_logps' must be a number, not str 'low'"):
        load(write("a.csv", "prompt,chosen,rejected,ref_chosen_logps\np,a,b,1\np,a,b,low\n"), kind="pairs")
    with pytest.raises(UserError, match="line 2: 'flipped' must be true or false, not str 'maybe'"):
        load(write("b.csv", "prompt,chosen,rejected,flipped\np,a,b,maybe\n"), kind="pairs")


def test_text_and_prompts(write, chat):
    assert load(write("a.jsonl", [{"text": "a"}]), kind="text")[0] == {"row_id": 0, "text": "a"}
    pair = {"prompt": "a", "completion": "b", "text": "c"}
    assert load(write("b.jsonl", [pair]), kind="text")[0] == {"row_id": 0, "prompt": "a", "completion": "b"}
    talk = {"messages": chat("Hi", "A"), "prompt": "Hi"}
    assert load(write("c.jsonl", [talk]), kind="text")[0] == {"row_id": 0, "messages": chat("Hi", "A")}
    assert "no message of the assistant" in refusal(write, [{"messages": chat("Hi")}], kind="text")
    assert "'messages' is text and must be a list" in refusal(write, [{"messages": "Hi"}], kind="text")
    with pytest.raises(UserError, match="line 2: 'messages' is text .* use JSON lines"):
        load(write("f.csv", 'messages\n"[{""role"": ""user"", ""content"": ""Hi""}]"\n'), kind="text")
    assert "no 'messages', no 'prompt' with 'completion' and no 'text'; it has: answer" in refusal(
        write, [{"answer": "x"}], kind="text"
    )  # fmt: skip
    assert load(write("d.jsonl", [{"prompt": chat("Hi"), "x": 1}]), kind="prompts")[0]["prompt"] == chat("Hi")
    chosen = load({"path": write("e.jsonl", [GOOD]), "columns": {"completion": "chosen"}}, kind="text")
    assert chosen[0] == {"row_id": 0, "prompt": GOOD["prompt"], "completion": GOOD["chosen"]}


@pytest.mark.parametrize("name", ["images", "tools", "chat_template_kwargs"])
def test_what_the_model_would_see_is_not_dropped_in_silence(write, name):
    row = GOOD | {name: ["x"]}
    assert f"has '{name}', which would change what the model sees" in refusal(write, [row])
    assert load({"path": write("a.jsonl", [row]), "columns": {"prompt": "prompt"}}, kind="pairs").num_rows == 1


def test_an_unknown_kind():
    with pytest.raises(UserError, match="'pair' is no kind of data; known are: pairs, groups, prompts, text"):
        load("a.jsonl", kind="pair")
