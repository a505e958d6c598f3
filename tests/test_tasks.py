"""eval.py's tasks: prompts against the harness's own, scores against a plain restatement, files that are not
what they should be. tests/compare_lm_eval.py runs the harness itself."""

import json

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from conftest import ROOT, SHARED
from launch import finished, ranks_of
from lib.cli import UserError
from lib.tasks import Item, read_task
from model import Llama, LlamaConfig
from tools import sample

MARKED = ROOT / "tests/evals"  # HellaSwag items with every mark, and the harness's prompts for them
BYTES = data.get_tokenizer("bytes")
LONG = ["--seq_len", 256, "--tokens_per_step", 256]


def read(task, directory):
    return read_task(task, *evaluation.TASKS[task], directory)


@pytest.fixture
def model():
    """Random weights, large enough that each choice has its own log-probability."""
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=2, vocab_size=320, seq_len=100)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model


@torch.no_grad()
def plain_log_probability(model, tokenizer, context: str, text: str) -> float:
    """Of " text" after context: the whole, cut from the left to what the model reads, in one sequence,
    in float64."""
    context, ending = evaluation.encode_pair(tokenizer, context, f" {text}")
    tokens = torch.tensor([(context + ending)[-model.config.seq_len - 1:]])
    log_p = model.double()(tokens[:, :-1])[0, :, :tokenizer.n_vocab].log_softmax(-1)
    model.float()
    return log_p.gather(1, tokens[0, 1:, None])[-len(ending):].sum().item()


# ------------------------------------------ Prompts and the scores ------------------------------------------

def test_hellaswags_prompts_are_the_harnesss():
    items = read("hellaswag", MARKED)
    theirs = json.loads((MARKED / "harness_prompts.json").read_text("utf-8"))
    ours = [[[item.context, f" {text}"] for text in item.choices] for item in items]
    assert len(ours) >= 20 and ours == theirs
    marks = (MARKED / "hellaswag_val.jsonl").read_text()
    assert all(mark in marks for mark in (" [title]", "[header]", "[step]", "  ", '"the man IS"'))
    assert any(context.endswith(" ") for item in theirs for context, _ in item)


def test_piqa_and_arc_easy_ask_a_question(tmp_path):
    (tmp_path / "valid.jsonl").write_text(
        '{"goal": "open [title] a  jar", "sol1": "turn ", "sol2": "hit"}\n' * 2)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    first, second = read("piqa", tmp_path)
    assert (first.context, first.choices, first.gold, second.gold) == (
        "Question: open [title] a  jar\nAnswer:", ["turn ", "hit"], 1, 0)
    questions = [{"id": i, "answerKey": key, "question": {"stem": "Why?", "choices": [
        {"text": f"because {label}", "label": label} for label in labels]}}
        for i, (key, labels) in enumerate([("C", "ABCD"), ("2", "1234"), ("A", "ABC"), ("E", "ABCDE")])]
    (tmp_path / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    items = read("arc_easy", tmp_path)
    assert [item.gold for item in items] == [2, 1, 0, 4]
    assert [len(item.choices) for item in items] == [4, 4, 3, 5]
    assert items[1].context == "Question: Why?\nAnswer:" and items[1].choices[0] == "because 1"


def test_the_shared_files_are_read_whole():
    directory = SHARED / "data/evals"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    found = {task: read(task, directory) for task in evaluation.TASKS}
    assert {name: len(items) for name, items in found.items()} == {"hellaswag": 4000, "piqa": 1838,
                                                                  "arc_easy": 2376}
    assert {len(item.choices) for item in found["arc_easy"]} == {3, 4, 5}
    assert {item.gold for item in found["piqa"]} == {0, 1}


def test_spaces_at_the_end_of_a_context_go_to_the_continuation():
    def pair(context, continuation):
        return [BYTES.decode(tokens) for tokens in evaluation.encode_pair(BYTES, context, continuation)]
    assert pair("a b", " c") == ["a b", " c"]
    assert pair("a b \n", " c") == ["a b", " \n c"]
    assert pair("", " c") == pair("", " c") == ["<|endoftext|>", " c"]
    assert pair("  ", " c") == ["<|endoftext|>", "   c"]


def test_tokens_are_cut_where_the_tokens_of_the_context_end():
    """As the harness does it, also where the whole is not cut there: the tokens of the whole after as
    many."""
    try:
        gpt2 = data.get_tokenizer("gpt2")
    except UserError:
        pytest.skip("gpt2's files are not here: set TIKTOKEN_CACHE_DIR")
    context, ending = evaluation.encode_pair(gpt2, "Answer", "ing it")
    assert [gpt2.decode([t]) for t in context] == ["Answer"]
    assert [gpt2.decode([t]) for t in ending] == ["sw", "ering", " it"]  # of An-sw-ering it


@pytest.mark.parametrize("budget", [1, 500, 10**6])
def test_log_probabilities_are_those_of_each_choice_alone(model, budget, monkeypatch):
    """Also where the context loses its beginning, and other endings of it do not (seq_len 100)."""
    monkeypatch.setitem(evaluation.BATCH_TOKENS, "cpu", budget)
    items = read("hellaswag", MARKED)
    lengths = [[len(tokens) for tokens in evaluation.encode_pair(BYTES, item.context, f" {text}")]
               for item in items for text in item.choices]
    cut = [sum(pair) > 101 for pair in lengths]
    assert (any(cut) and not all(cut)
            and {tuple(cut[i:i + 4]) for i in range(0, len(cut), 4)} - {4 * (True,), 4 * (False,)})
    found = evaluation.log_probabilities(model, items, BYTES, "float32")
    wanted = [[plain_log_probability(model, BYTES, item.context, text) for text in item.choices]
              for item in items]
    assert np.abs(np.array(found) - wanted).max() < 1e-3
    assert np.ptp(wanted, axis=1).min() > 0.1  # which 1e-3 tells apart


def test_batches_hold_the_longest_rows_first_within_the_budget():
    rows = [(list(range(n)), 1) for n in (3, 9, 5, 9, 1)]
    assert evaluation.batches_of(rows, 20) == [[1, 3], [2, 0, 4]]
    assert evaluation.batches_of(rows, 1) == [[1], [3], [2], [0], [4]]


def test_a_context_that_is_too_long_loses_its_beginning():
    item = Item("", "a context of many bytes that is cut", ["one", "two"], 0)
    (row, ending), _ = evaluation.rows_of([item], BYTES, 20)
    assert len(row) == 21 and BYTES.decode(row).endswith("bytes that is cut one"[-21:]) and ending == 4


def test_the_padding_of_the_vocabulary_never_counts(model, corpus):
    items, val = read("hellaswag", MARKED)[:4], data.open_split(corpus, "val", 64, "bytes")

    def scores():
        return (evaluation.log_probabilities(model, items, BYTES, "float32"),
                evaluation.validate(model, val, 10**6, 8, "float32")["val_loss"])
    before = scores()
    with torch.no_grad():
        model.head.weight[257:] = 9 * model.head.weight[:63]
    assert scores() == before


def test_answers_are_by_sum_and_by_character_the_first_of_equals():
    item = Item("", "", ["ab", "abcd", "", "ééé"], 0)
    assert evaluation.answers(item, [-4.0, -6.0, -9.0, -4.2]) == (0, 3)
    assert evaluation.answers(item, [-4.0, -4.0, -9.0, -6.0]) == (0, 1)
    assert evaluation.answers(item, [-2.0, -4.0, -9.0, -3.0]) == (0, 0)


def test_accuracies_have_the_harnesss_standard_errors(model):
    items = read("hellaswag", MARKED)
    scores, records = evaluation.evaluate(model, "hellaswag", items, BYTES, "float32")
    for name, key in ("acc", "answer"), ("acc_norm", "answer_norm"):
        right = np.array([record[key] == item.gold for record, item in zip(records, items)], dtype=float)
        assert scores[f"hellaswag_{name}"] == pytest.approx(right.mean())
        assert scores[f"hellaswag_{name}_stderr"] == pytest.approx(right.std(ddof=1) / len(items)**0.5)
    assert evaluation.evaluate(model, "x", items[:1], BYTES, "float32")[0]["x_acc_stderr"] is None


def test_an_ending_that_the_model_can_not_read_names_its_item():
    def rows(*choices):
        item = Item("hellaswag_val.jsonl, line 7", "c", list(choices), 0)
        return evaluation.rows_of([item], BYTES, 100)
    assert max(len(row) for row, _ in rows("x" * 99, "x" * 98)) == 101  # all it reads, and one to predict
    with pytest.raises(UserError, match="line 7.*101 tokens.*100.*--seq_len"):
        rows("fits", "x" * 100)


# ----------------------------------------------- The command ------------------------------------------------

def test_scores_items_and_limits(trained_once, tmp_path, capsys):
    out, scores, items = trained_once("--steps", 1, *LONG), tmp_path / "scores.json", tmp_path / "items.jsonl"
    capsys.readouterr()
    evaluation.main([str(out), "--tasks", "perplexity,hellaswag", "--eval_dir", str(MARKED), "--limit", "9",
                     "--json", str(scores), "--items", str(items), "--dtype", "bfloat16", "--device", "cpu"])
    printed, found = capsys.readouterr().out, json.loads(scores.read_text())
    assert {"val_loss", "bits_per_byte", "hellaswag_acc", "hellaswag_acc_norm", "hellaswag_acc_stderr",
            "hellaswag_acc_norm_stderr", "hellaswag_items_per_second"} <= found.keys()
    assert all(f"{key}: {value}" in printed for key, value in found.items())
    records = [json.loads(line) for line in items.read_text().splitlines()]
    assert len(records) == found["hellaswag_items"] == 9
    assert found["hellaswag_acc"] == sum(r["answer"] == r["gold"] for r in records) / 9
    assert all(len(r["log_probabilities"]) == 4 and max(r["log_probabilities"]) < 0 for r in records)


@pytest.mark.parametrize("flags", [*(["--method", name] for name in train.METHODS), ["--factorize", "ffn"]],
                         ids=str)
def test_every_method_s_checkpoint_is_scored_and_sampled(run, tmp_path, capsys, flags):
    out = run("--steps", 1, *LONG, *flags)
    scores = tmp_path / "scores.json"
    evaluation.main([str(out), "--tasks", "hellaswag", "--eval_dir", str(MARKED), "--json", str(scores)])
    assert json.loads(scores.read_text())["hellaswag_items"] == 24
    capsys.readouterr()
    sample.main([str(out), "--tokens", "3"])
    assert capsys.readouterr().out


def test_two_ranks_find_what_one_finds(trained_once, tmp_path):
    out = trained_once("--steps", 1, *LONG)
    flags = ["--tasks", "perplexity,hellaswag", "--eval_dir", str(MARKED)]
    found = []
    for ranks in 1, 2:
        scores, items = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.jsonl"
        argv = [str(out), *flags, "--json", str(scores), "--items", str(items), "--device", "cpu"]
        if ranks == 1:
            evaluation.main(argv)
        else:
            finished(ranks_of(2, "import sys, eval\neval.main(sys.argv[1:])", argv))
        found.append((json.loads(scores.read_text()), items.read_text()))
    (one, items), (two, same) = found
    speed = "hellaswag_items_per_second"
    assert items == same and one.pop(speed) > 0 and two.pop(speed) > 0
    assert one.pop("val_loss") == pytest.approx(two.pop("val_loss"), abs=1e-6)
    assert {key: one[key] for key in one if key.startswith("hellaswag")} == {
        key: two[key] for key in two if key.startswith("hellaswag")}


def test_misuse_is_one_message(run, fails, tmp_path):
    out = run("--steps", 1)
    fails(evaluation.main, [out, "--tasks", "helaswag"], "helaswag", "perplexity,hellaswag,piqa,arc_easy")
    fails(evaluation.main, [out, "--limit", 0], "--limit", "at least 1")
    for flag, path in ("--json", tmp_path / "no/where.json"), ("--items", tmp_path):
        fails(evaluation.main, [out, flag, path], "expected a file, in a directory that is there", path)
    fails(evaluation.main, [out, "--tasks", "hellaswag", "--eval_dir", MARKED], "line 1", "--seq_len",
          "--limit")
    fails(evaluation.main, [out, "--tasks", "piqa", "--eval_dir", tmp_path], "piqa", "valid.jsonl",
          "python -m tools.download evals", "--eval_dir")
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    checkpoint["model"] = {k: v[:64] if k in ("embedding.weight", "head.weight") else v
                           for k, v in checkpoint["model"].items()}
    checkpoint["config"]["model"]["vocab_size"] = 64
    torch.save(checkpoint, out / "ckpt.pt")
    fails(evaluation.main, [out], "vocabulary of 64", "'bytes' needs 320")


GOOD = json.dumps({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1})


@pytest.mark.parametrize("bad", [GOOD[:-20], "[1, 2]", "17", GOOD.replace("1}", "2}"),
                                 GOOD.replace("1}", "-1}"),
                                 GOOD.replace('"b"', "3"), GOOD.replace(', "label": 1', ""),
                                 GOOD.replace('["d", "e"]', "null"), GOOD.replace('"c"', "null"),
                                 GOOD.replace('["d", "e"]', '"de"'), GOOD.replace("1}", "0.5}"),
                                 GOOD.replace("1}", "Infinity}"), "[" * 100_000,
                                 GOOD.replace('["d", "e"]', "[1, 2]"), GOOD.replace('"a"', '{"a": 1}')])
def test_a_bad_line_is_named(tmp_path, bad):
    (tmp_path / "hellaswag_val.jsonl").write_text(f"{GOOD}\n{bad}\n")
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl, line 2.*tools.download evals"):
        read("hellaswag", tmp_path)


def test_files_that_are_missing_half_there_empty_or_do_not_fit(tmp_path):
    def refused(task, *fragments):
        with pytest.raises(UserError) as caught:
            read(task, tmp_path)
        assert all(fragment in str(caught.value) for fragment in (*fragments, "tools.download evals"))
    refused("hellaswag", "no hellaswag_val.jsonl")
    (tmp_path / "hellaswag_val.jsonl.part").write_text(GOOD)
    refused("hellaswag", "hellaswag_val.jsonl.part", "half")
    (tmp_path / "hellaswag_val.jsonl").write_text("\n")
    refused("hellaswag", "0 items")
    (tmp_path / "hellaswag_val.jsonl").write_bytes(b"\xff\xfe")
    refused("hellaswag", "not UTF-8")
    (tmp_path / "piqa_valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n' * 3)
    (tmp_path / "piqa_valid-labels.lst").write_bytes(b"\xff\xfe1")
    refused("piqa", "labels.lst", "not UTF-8")
    for labels, said in (("0\n1\n", "line 3"), ("0\n1\n2\n", "label is 2"), ("0\n1\n1\n0\n", "4 labels"),
                         ("", "line 1")):
        (tmp_path / "piqa_valid-labels.lst").write_text(labels)
        refused("piqa", said)
    (tmp_path / "ARC-Easy-Test.jsonl").write_text(
        '{"answerKey": "D", "question": {"stem": "s", "choices": [{"text": "t", "label": "A"}]}}')
    refused("arc_easy", "line 1", "'D' is not in list")


def test_a_byte_order_mark_before_the_items_is_skipped(tmp_path):
    (tmp_path / "hellaswag_val.jsonl").write_text(GOOD, encoding="utf-8-sig")
    assert read("hellaswag", tmp_path)[0].context == "a: b C"
