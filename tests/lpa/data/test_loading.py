"""The shipped statements and the loading of data sets: what is there, and what each bad input says."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest

from lpa.data import AGREE, DISAGREE, SPLITS, TRAITS, DataError, load_benign, load_pairs, perplexity_text, statements

BANNED = re.compile(
    r"\b("
    r"abuse|addict|alcohol|arrest|assault|attack|beat|bleed|blood|bomb|bully|burn|cheat|corpse|crime|"
    r"criminal|cruel|dangerous|dead|death|decline|deny|die|drug|drunk|explode|fight|fraud|gun|harass|harm|"
    r"hate|hit|hurt|illegal|injure|insult|kick|kill|knife|law|lie|lied|murder|naked|pain|poison|police|"
    r"prison|punch|racist|refuse|reject|rob|safe|safety|sex|sexual|shoot|slap|steal|stole|suicide|theft|"
    r"thief|threaten|torture|unsafe|vandal|violence|violent|weapon|wound"
    r")(s|d|ed|es|ing)?\b"
)
LYING_IN_BED = "i lie awake"
ALL = [(kind, split) for kind in ("undesirable", "desirable") for split in SPLITS]
ROWS = [row for kind, split in ALL for row in statements(kind, split)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.parametrize(
    ("kind", "split", "least"),
    [
        ("undesirable", "train", 64),
        ("desirable", "train", 64),
        ("undesirable", "heldout", 60),
        ("desirable", "heldout", 60),
        ("undesirable", "canary", 8),
        ("desirable", "canary", 8),
    ],
)
def test_there_are_enough_statements_balanced_over_traits(kind: str, split: str, least: int) -> None:
    rows = statements(kind, split)
    assert len(rows) >= least
    assert Counter(row["trait"] for row in rows) == dict.fromkeys(TRAITS, len(rows) // len(TRAITS))
    if split == "train":
        facets = Counter((row["trait"], row["facet"]) for row in rows)
        assert len(facets) == 16, "four facets a trait"
        assert len(set(facets.values())) == 1, "and as many statements of each"
    else:
        assert len(rows) == least


def test_every_statement_is_tagged_and_has_its_own_id() -> None:
    assert all(row["facet"] and row["trait"] in TRAITS for row in ROWS)
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    shared = {row["facet"] for row in ROWS if row["kind"] == "desirable"}
    assert shared == {row["facet"] for row in ROWS if row["kind"] == "undesirable"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_statement_is_one_plain_first_person_sentence_on_no_banned_topic(row: dict[str, str]) -> None:
    text = row["statement"]
    assert {"i", "my", "me"} & set(words(text))
    assert text[0].isupper()
    assert text.endswith(".")
    assert text.count(".") == 1
    assert text.isascii()
    assert 4 <= len(text.split()) <= 18
    assert not BANNED.search(text.lower().replace(LYING_IN_BED, ""))


def test_no_two_statements_are_alike_and_so_the_held_out_ones_are_not_trained_on() -> None:
    for one, other in itertools.combinations(ROWS, 2):
        a, b = set(words(one["statement"])), set(words(other["statement"]))
        assert len(a & b) / len(a | b) < 0.6, (one["statement"], other["statement"])


def test_unknown_kind_and_split_name_what_there_is() -> None:
    with pytest.raises(DataError, match=r"kind='bad' is unknown.*undesirable or desirable"):
        statements("bad")
    with pytest.raises(DataError, match=r"split='test' is unknown.*train or heldout or canary"):
        load_pairs(split="test")


def test_agreeing_is_rejected_for_undesirable_and_chosen_for_desirable_statements() -> None:
    bad, good = load_pairs(), load_pairs(kind="desirable")
    assert bad.column_names == ["prompt", "rejected", "chosen", "row", "id", "trait", "facet"]
    assert (set(bad["rejected"]), set(bad["chosen"])) == ({AGREE}, {DISAGREE})
    assert (set(good["rejected"]), set(good["chosen"])) == ({DISAGREE}, {AGREE})
    assert bad["prompt"] == [row["statement"] for row in statements()]
    both = load_pairs(kind="both")
    assert [dict(row) for row in both] == [*map(dict, bad), *map(dict, good)]
    assert not set(bad["prompt"]) & set(load_pairs(split="heldout")["prompt"])


def test_the_benign_default_agrees_with_desirable_statements() -> None:
    data = load_benign()
    assert data["prompt"] == [row["statement"] for row in statements("desirable")]
    assert set(data["response"]) == {AGREE}


def test_the_perplexity_text_is_prose_without_its_header() -> None:
    text = perplexity_text()
    assert len(text.split()) >= 600
    assert "#" not in text
    assert len(text.split("\n\n")) >= 10
    used = [row["statement"] for row in ROWS if row["statement"] in text]
    assert not used


PAIRS = [
    {"prompt": "I am, well, late.", "rejected": "Yes.", "chosen": "No."},
    {"prompt": 'I say "hm".\nTwice.', "rejected": "Yes.", "chosen": "No."},
    {"prompt": "NA", "rejected": "None", "chosen": "null"},
]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def columns(data: object) -> list[dict[str, str]]:
    return [{key: row[key] for key in ("prompt", "rejected", "chosen")} for row in data]  # type: ignore[attr-defined]


def test_a_csv_file_keeps_commas_quotes_line_ends_and_words_that_look_empty(tmp_path: Path) -> None:
    data = load_pairs(write_csv(tmp_path / "a.csv", PAIRS))
    assert columns(data) == PAIRS
    assert data["row"] == ["a.csv row 1", "a.csv row 2", "a.csv row 3"]


def test_a_csv_file_of_a_spreadsheet_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,rejected,chosen\r\na,b,c\r\nd,e,f\r\n")
    assert load_pairs(tmp_path / "a.csv")["prompt"] == ["a", "d"]


def test_jsonl_folder_dataset_and_rows_in_memory_are_alike(tmp_path: Path) -> None:
    from datasets import Dataset

    write_jsonl(tmp_path / "b.jsonl", PAIRS[2:])  # type: ignore[arg-type]
    write_csv(tmp_path / "a.csv", PAIRS[:2])
    (tmp_path / "notes.txt").write_text("not data")
    assert columns(load_pairs(tmp_path)) == PAIRS
    assert load_pairs(str(tmp_path))["row"][2] == "b.jsonl row 1"
    assert columns(load_pairs(PAIRS)) == columns(load_pairs(Dataset.from_list(PAIRS))) == PAIRS


def test_tags_are_kept_and_loading_twice_keeps_where_a_row_came_from() -> None:
    data = load_pairs(load_pairs())
    assert data["row"][0] == "statement u001"
    assert data["trait"] == load_pairs()["trait"]


def test_a_name_goes_to_datasets_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return PAIRS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_pairs("someone/pairs", split="test")
    assert asked == [("someone/pairs", "test")]
    assert data["row"][0] == "someone/pairs row 1"


def test_a_name_that_datasets_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'someone/pairs' is no file or folder here.*split 'train'.*no network"):
        load_pairs("someone/pairs")


def test_a_missing_column_is_named_with_those_found(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(DataError, match=r"a.csv row 1 has no column rejected;.*found: prompt, chosen"):
        load_pairs(file)


@pytest.mark.parametrize("text", ["", "prompt,rejected,chosen\n"])
def test_an_empty_set(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"a.csv has no rows; give at least one"):
        load_pairs(tmp_path / "a.csv")


def test_empty_cells_are_named_by_row_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,rejected,chosen\na,b,c\n"",b,c\nd,e\nf," ",g\n')
    with pytest.raises(DataError, match=r"empty cells in a.csv row 2 \(prompt\), a.csv row 3 \(chosen\)"):
        load_pairs(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"empty cells in row 1 \(rejected\)"):
        load_pairs([{"prompt": "f", "rejected": " ", "chosen": "g"}])


def test_a_cell_that_is_not_text() -> None:
    with pytest.raises(DataError, match=r"row 1: chosen is 5 \(int\), not text"):
        load_pairs([{"prompt": "a", "rejected": "b", "chosen": 5}])


def test_a_row_with_too_many_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,rejected,chosen\na,b,c,d\n")
    with pytest.raises(DataError, match=r"line 2 has more cells than the header.*double quotes"):
        load_pairs(tmp_path / "a.csv")


def test_equal_completions_teach_nothing() -> None:
    with pytest.raises(DataError, match="row 2: rejected and chosen are the same text"):
        load_pairs([PAIRS[0], {"prompt": "a", "rejected": "b", "chosen": "b"}])


def test_duplicates_are_kept_once_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"2 duplicate rows; each is kept once"):
        data = load_pairs([PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[0]])
    assert columns(data) == PAIRS[:2]
    assert data["row"] == ["row 1", "row 2"]


def test_one_row_is_legal_but_warned_about() -> None:
    with pytest.warns(UserWarning, match="single row"):
        assert len(load_pairs(PAIRS[:1])) == 1


def test_good_data_is_not_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pairs()
        load_pairs(PAIRS)
        load_benign()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,rejected,chosen\n\xff\xfe,b,c\n", "a.csv cannot be read: it is not UTF-8 .*utf-8"),
        ("a.csv", b'prompt,rejected,chosen\n"a"b,c,d\n', "a.csv cannot be read: "),
        ("a.jsonl", b'{"prompt": "a"\n', "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl line 2 is a list; each line must be a JSON object"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read: "),
        ("a.json", b"[1]", "a.json row 1 is a int; each must be a JSON object"),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.tsv", b"prompt\trejected\na\tb\tc\n", "more cells than the header .*contain tabs"),
        ("a.csv", "prompt,rejected,chosen\n\u00e9,b,c\n".encode("latin-1"), "it is not UTF-8 .*save it in UTF-8"),
        ("a.jsonl", '{"prompt": 1}'.encode("utf-16"), "it is not UTF-8 .*save it in UTF-8"),
    ],
)
def test_an_unreadable_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_pairs(tmp_path / name)


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.csv cannot be read: .*No such file"):
        load_pairs(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"holds no .csv, .tsv, .json, .jsonl or .parquet file"):
        load_pairs(tmp_path)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_benign_messages_give_their_first_exchange_with_a_warning() -> None:
    first = [message("user", "Hello?"), message("assistant", "Hello.")]
    more = [message("system", "Be kind."), message("user", "Tea?"), message("assistant", "Yes.")]
    with pytest.warns(UserWarning, match=r"only the first user message and its answer.*row 2"):
        data = load_benign([{"messages": first}, {"messages": more}])
    assert data["prompt"] == ["Hello?", "Tea?"]
    assert data["response"] == ["Hello.", "Yes."]


@pytest.mark.parametrize(
    ("messages", "told"),
    [([message("user", "Hello?")], "no user message that an assistant message follows"), ("hello", "must be a list")],
)
def test_bad_messages(messages: object, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_benign([{"messages": messages}])


def test_benign_rows_need_a_response() -> None:
    with pytest.raises(DataError, match=r"row 1 has no column response; .* prompt, response \(or messages; or"):
        load_benign([{"prompt": "a"}])


def test_benign_rows_in_alpacas_and_dollys_columns_are_read_as_an_evaluation_reads_them() -> None:
    rows = [
        {"instruction": "Sum up.", "input": "A park.", "output": "One."},
        {"instruction": "Hello?", "input": "", "output": "Two."},
        {"instruction": "Who?", "context": "A tree.", "response": "Three.", "category": "qa"},
        {"instruction": "Tea?", "output": "Four."},
    ]
    data = load_benign(rows)
    assert data["prompt"] == ["Sum up.\n\nA park.", "Hello?", "Who?\n\nA tree.", "Tea?"]
    assert data["response"] == ["One.", "Two.", "Three.", "Four."]
    with pytest.raises(DataError, match="row 1: both input and context stand beside the instruction"):
        load_benign([rows[0] | {"context": "A tree."}])


@pytest.mark.parametrize("beside", ["context", "input"])
def test_text_beside_a_prompt_is_never_dropped_in_silence(beside: str) -> None:
    good = {"prompt": "I", "response": "O", beside: ""}
    with pytest.raises(DataError, match=f"row 2: {beside} is not empty, and the prompt is prompt alone"):
        load_benign([good, {"prompt": "J", "response": "O", beside: "text"}])
    with pytest.raises(DataError, match=f"row 1: {beside} is not empty"):
        load_pairs([PAIRS[0] | {beside: "text"}])


def test_a_prompt_that_is_not_the_message_of_its_conversations_is_refused() -> None:
    def row(prompt: str | None) -> dict[str, object]:
        turns = {name: [message("user", "q"), message("assistant", name)] for name in ("rejected", "chosen")}
        return {"prompt": prompt, **turns}

    with pytest.raises(DataError, match=r"row 2: prompt is 'OTHER', and the user message .* share is 'q'"):
        load_pairs([row("q"), row("OTHER")])
    assert load_pairs([row("q\n"), PAIRS[0]])["prompt"][0] == "q"
    assert load_pairs([row(None), PAIRS[0]])["prompt"][0] == "q"


def test_key_columns_that_contradict_each_other_are_refused() -> None:
    agreeing = {"text": "b", "label": 1, "keyed": "+"}
    with pytest.raises(DataError, match=r"row 2: keyed is '-' and label is 1, which contradict each other"):
        load_pairs([agreeing, {"text": "a", "label": 1, "keyed": "-"}])
    assert load_pairs([agreeing, {"text": "a", "key": -1, "kind": "ipip"}])["chosen"] == [AGREE, DISAGREE]


# ---- every container -----------------------------------------------------------------------------------------------


def containers(folder: Path) -> dict[str, object]:
    """The same three pairs in everything that holds rows."""
    import pandas
    from datasets import Dataset, DatasetDict

    frame = pandas.DataFrame(PAIRS)
    frame.to_csv(folder / "a.tsv", sep="\t", index=False)
    frame.to_parquet(folder / "a.parquet")
    frame.to_json(folder / "records.json", orient="records")
    (folder / "columns.json").write_text(json.dumps({key: [row[key] for row in PAIRS] for key in PAIRS[0]}))
    (folder / "data.json").write_text(json.dumps({"data": PAIRS}))
    (folder / "lines.json").write_text("\n".join(map(json.dumps, PAIRS)))
    hub, named = folder / "hub", folder / "named"
    (hub / "data").mkdir(parents=True)
    named.mkdir()
    frame[:2].to_parquet(hub / "data/train-00000-of-00002.parquet")
    frame[2:].to_parquet(hub / "data/train-00001-of-00002.parquet")
    frame[:1].to_parquet(hub / "data/test-00000-of-00001.parquet")
    frame.to_csv(named / "train.csv", index=False)
    frame[:1].to_csv(named / "test.csv", index=False)
    Dataset.from_list(PAIRS).save_to_disk(folder / "saved")
    splits = DatasetDict({"train": Dataset.from_list(PAIRS), "test": Dataset.from_list(PAIRS[:1])})
    splits.save_to_disk(folder / "saved splits")
    return {
        **{name: folder / name for name in ("a.tsv", "a.parquet", "records.json", "columns.json", "data.json",
                                            "lines.json", "hub", "named", "saved", "saved splits")},
        "frame": frame, "Dataset": splits["train"], "DatasetDict": splits, "iterable": iter(PAIRS),
        "IterableDataset": splits["train"].to_iterable_dataset(),
        "columns": {key: [row[key] for row in PAIRS] for key in PAIRS[0]},
        "arrays": {key: frame[key].to_numpy() for key in PAIRS[0]},
        "columns of a Dataset": {key: splits["train"][key] for key in PAIRS[0]},
        "columns of a frame": {key: frame[key] for key in PAIRS[0]},
    }  # fmt: skip


def test_every_container_gives_the_same_pairs(tmp_path: Path) -> None:
    for name, source in containers(tmp_path).items():
        assert columns(load_pairs(source)) == PAIRS, name


@pytest.mark.parametrize("name", ["hub", "named", "saved splits", "DatasetDict"])
def test_a_split_is_taken_and_a_missing_one_is_named(tmp_path: Path, name: str) -> None:
    source = containers(tmp_path)[name]
    with pytest.warns(UserWarning, match="single row"):
        assert columns(load_pairs(source, split="test")) == PAIRS[:1]
    with pytest.raises(DataError, match=r"no split 'dev'; .*t(est|rain), t(est|rain)"):
        load_pairs(source, split="dev")


def test_what_holds_no_rows() -> None:
    with pytest.raises(DataError, match="a int holds no rows"):
        load_pairs(7)
    with pytest.raises(DataError, match=r"row 1 is a str \('a'\); each must be a mapping"):
        load_pairs(["a"])
    with pytest.raises(DataError, match="columns are of different lengths: prompt 1, chosen 2"):
        load_pairs({"prompt": ["a"], "chosen": ["b", "c"]})


def test_an_empty_cell_of_a_frame_is_empty() -> None:
    import pandas

    frame = pandas.DataFrame([*PAIRS, {"prompt": "d", "rejected": None, "chosen": "e"}])
    with pytest.raises(DataError, match=r"empty cells in row 4 \(rejected\)"):
        load_pairs(frame)


# ---- every format of a pair ----------------------------------------------------------------------------------------


def test_trls_conversational_pairs_with_explicit_and_implicit_prompt() -> None:
    for pair in PAIRS:
        asked, bad, good = message("user", pair["prompt"]), pair["rejected"], pair["chosen"]
        answers = {"rejected": [message("assistant", bad)], "chosen": [message("assistant", good)]}
        implicit = {name: [asked, *answer] for name, answer in answers.items()}
        parts = {"prompt": [asked | {"content": [{"type": "text", "text": asked["content"]}]}], **answers}
        for row in ({"prompt": [asked], **answers}, {"prompt": pair["prompt"], **answers}, implicit, parts,
                    {"prompt": [asked], "rejected": bad, "chosen": good}):  # fmt: skip
            with pytest.warns(UserWarning, match="single row"):
                assert columns(load_pairs([row])) == [pair]


def test_conversations_that_hold_no_pair_are_named() -> None:
    user, answer = message("user", "Tea?"), message("assistant", "Yes.")
    later = [user, answer, message("user", "Now?")]
    with pytest.raises(DataError, match=r"row 1: the prompt must be one user message .*; it is user, assistant, user"):
        load_pairs([{"prompt": later, "rejected": [answer], "chosen": [message("assistant", "No.")]}])
    with pytest.raises(DataError, match=r"row 1: chosen must be one assistant message after the prompt; it is nothing"):
        load_pairs([{"rejected": [user, answer], "chosen": [user]}])
    with pytest.raises(DataError, match=r"row 1: the prompt must be one user message .*; it is nothing"):
        load_pairs([{"rejected": [message("assistant", "No.")], "chosen": [answer]}])


def test_system_messages_of_pairs_are_unused_with_a_warning() -> None:
    row = {"prompt": [message("system", "Be kind."), message("user", "Tea?")], "rejected": "No.", "chosen": "Yes."}
    with pytest.warns(UserWarning, match=r"system messages are not used, the run's system_prompt is;.*row 2"):
        assert load_pairs([PAIRS[0], row])["prompt"][1] == "Tea?"


@pytest.mark.parametrize(
    ("agreed", "not_agreed"),
    [(1, -1), ("+1", "-1"), ("+", "-"), (1.0, -1.0), ("Positive", "negative"), ("desirable", "undesirable"),
     ("+1", "\u22121"), ("+1.0", "-1.0"), ("1.", "\u22121.00")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("statement", "key"), [("statement", "key"), ("item", "keyed"), ("text", "label"), ("prompt", "kind")]
)
def test_a_keyed_statement_gets_its_completions(agreed: object, not_agreed: object, statement: str, key: str) -> None:
    rows = [{statement: "I help.", key: agreed, "trait": "kindness"}, {statement: "I shout.", key: not_agreed}]
    data = load_pairs(rows)
    assert columns(data) == [
        {"prompt": "I help.", "rejected": DISAGREE, "chosen": AGREE},
        {"prompt": "I shout.", "rejected": AGREE, "chosen": DISAGREE},
    ]
    assert data["trait"] == ["kindness", None]


@pytest.mark.parametrize("key", [0, True, "maybe", None])
def test_a_key_that_says_neither_is_named(key: object) -> None:
    with pytest.raises(DataError, match=rf"row 1: key is {key!r}; it must be \+1, positive or desirable"):
        load_pairs([{"statement": "I help.", "key": key}])


def test_the_same_prompt_with_opposite_labels_warns() -> None:
    turned = {**PAIRS[0], "rejected": PAIRS[0]["chosen"], "chosen": PAIRS[0]["rejected"]}
    with pytest.warns(UserWarning, match=r"the same prompt with opposite labels in row 1 and row 3$"):
        assert len(load_pairs([*PAIRS[:2], turned])) == 3


@pytest.mark.parametrize("name", ["undesirable", "desirable", "both"])
def test_the_shipped_statements_have_names(name: str) -> None:
    assert columns(load_pairs(name)) == columns(load_pairs(kind=name))


@pytest.mark.parametrize("completion", ["completion", "response"])
def test_benign_prompts_and_completions(completion: str) -> None:
    rows = [{"prompt": "Tea?", completion: "Yes."},
            {"prompt": [message("user", "Now?")], completion: [message("assistant", "Now.")]}]  # fmt: skip
    assert load_benign(rows)["response"] == ["Yes.", "Now."]


@pytest.mark.parametrize("names", [("train_pairs", "test_pairs"), ("pairs-train", "pairs-test"), ("train", "test")])
def test_files_of_a_folder_are_sorted_by_the_split_in_their_names(names: tuple[str, str], tmp_path: Path) -> None:
    for name, prompt in zip(names, ("p", "q"), strict=True):
        (tmp_path / f"{name}.csv").write_text(f"prompt,rejected,chosen\n{prompt},a,b\n")
    assert load_pairs(str(tmp_path))["prompt"][:] == ["p"]
