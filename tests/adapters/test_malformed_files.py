"""Untrusted checkpoints: every fault is one error of one line."""

import copy
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2pd_adapters import chat_templates
from l2pd_adapters.chat_templates import MOST_LINES, all_rendered, rendered, template_problem
from l2pd_adapters.checkpoints import INDEX, find_checkpoint, wrong_settings
from l2pd_adapters.huggingface import load
from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompts import parse_prompts, read_prompts
from l2pd_tools.evaluation.run import encode_prompts
from tests.hub_checkpoints import CHECKPOINTS, Dense, write

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "llada", Dense(CHECKPOINTS["LLaDA"]))


def both(folder: Path, words: str, l2pd=None) -> None:
    """Assert that `load` and `l2pd doctor` each report these words in one line."""
    with pytest.raises(L2PDError) as raised:
        load(folder)
    told = str(raised.value)
    assert words in told and told.isprintable() and str(folder) in told
    problems = find_checkpoint(str(folder)).problems
    assert any(words in problem for problem in problems), problems
    assert all(problem.isprintable() for problem in problems)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_model": "64"}, "d_model = '64'; expected a whole number from 1"),
        ({"d_model": 10**12}, "d_model = 1000000000000; expected a whole number"),
        ({"d_model": float("nan")}, "d_model = nan; expected a whole number"),
        ({"n_layers": float("inf")}, "n_layers = inf; expected a whole number"),
        ({"n_layers": True}, "n_layers = True; expected a whole number"),
        ({"n_layers": -1}, "n_layers = -1; expected a whole number from 1 to 4096"),
        ({"n_layers": 10**9}, "n_layers = 1000000000; expected a whole number from 1 to 4096"),
        ({"vocab_size": 0}, "vocab_size = 0; expected a whole number"),
        ({"num_labels": 10**9}, "num_labels = 1000000000; expected a whole number"),
        ({"model_type": 5}, "model_type = 5; expected a text"),
        ({"model_type": "a\x1b[2J\n"}, r"model_type = 'a\x1b[2J\n'; expected a text"),
        ({"architectures": "LLaDAModelLM"}, "architectures = 'LLaDAModelLM'; expected a list"),
        ({"architectures": [[]]}, "architectures = [[]]; expected a list of names"),
        ({"mask_token_id": "97"}, "mask_token_id = '97'; expected a whole number"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id = {'a': 1}; expected a token id or a list"),
        ({"torch_dtype": ["float32"]}, "torch_dtype = ['float32']; expected a text"),
        ({"quantization_config": []}, "quantization_config = []; expected an object"),
        ({"text_config": {"hidden_size": 0}}, "text_config.hidden_size = 0; expected a whole"),
        ({"weight_tying": "no"}, "weight_tying = 'no'; expected true or false"),
    ],
)
def test_a_setting_of_another_type_is_refused(folder: Path, values: dict, words: str) -> None:
    change(folder / "config.json", **values)
    both(folder, f"config.json: {words}")


def test_a_wrong_generation_setting_is_refused(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[1, "2"])
    both(folder, "generation_config.json: eos_token_id = [1, '2']; expected a token id")


def test_correct_settings_are_accepted() -> None:
    for name, checkpoint in CHECKPOINTS.items():
        assert wrong_settings(checkpoint.config) == {}, name


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read: it is nested deeper"),
        ("[]", "holds a list; expected an object"),
        ("\ufeff{", "cannot be read: "),
        ('{"a": "\ud800"}', "cannot be read: it is not UTF-8"),
        (None, "cannot be read: it is a pipe"),
    ],
)
def test_a_file_without_settings_is_refused(
    folder, name: str, content: str | None, words: str
) -> None:
    (folder / name).unlink()
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    both(folder, f"{name} {words}")


@pytest.mark.parametrize(
    "name", ["../outside/x", "/absolute", "a/../../outside/x", "link", 5, None, ["x"], "", "\0"]
)
def test_an_index_out_of_the_folder_is_refused(folder: Path, name: object) -> None:
    """The file outside is valid, so reading it would cause no other error."""
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.move(folder / SHARD, outside / "x")
    (folder / "link").symlink_to(outside / "x")
    index = json.loads((folder / INDEX).read_text())
    target = str(outside / "x") if name == "/absolute" else name
    files = {w: target if f == SHARD else f for w, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    both(folder, f"{INDEX}: ")


def test_a_snapshot_of_links_is_accepted(folder: Path) -> None:
    """Each file of the hub's snapshot is a link to a blob of the same repository."""
    repository = folder.parent / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(path for path in folder.iterdir() if path.is_file()):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert find_checkpoint(str(snapshot)).problems == []
    load(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    both(snapshot, "'config.json' is a link that leads out of the folder")


@pytest.mark.parametrize(
    ("make", "words", "doctor_knows"),
    [
        (lambda w: w.to(torch.float8_e4m3fn), "is stored as F8_E4M3", True),
        (lambda w: w.to(torch.int8), "is stored as I8", True),
        (lambda w: w.double() * 0 + 1e300, "has values that are not finite", False),
        (lambda w: w * torch.nan, "has values that are not finite", False),
        (lambda w: w.bfloat16() / 0, "has values that are not finite", False),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    folder: Path, make, words: str, doctor_knows: bool
) -> None:
    """The doctor loads no weights: it knows their types but not their values."""
    weights = load_file(folder / SHARD)
    name = min(weights)
    save_file({**weights, name: make(weights[name])}, folder / SHARD, {"format": "pt"})
    if doctor_knows:
        both(folder, words)
    else:
        with pytest.raises(L2PDError, match=words):
            load(folder)


def test_a_config_of_a_far_larger_model_allocates_nothing(folder: Path) -> None:
    """All its weights would be missing, and transformers would first allocate them."""
    change(folder / "config.json", d_model=2**15, mlp_hidden_size=2**20, n_heads=2**8)
    with pytest.raises(L2PDError, match=r"a model of [0-9,]{12,} weights, the files hold"):
        load(folder)


TEMPLATES = {
    "{% for m in messages %}": "it is not valid Jinja: ",
    "{{ 'x' * 10000000000 }}": r"it holds the number 1e\+10",
    "{{ 'x' * 99999 * 99999 }}": "a product of products",
    "{{ 9 ** 9 ** 9 }}": r"a power \(\*\*\)",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deep|not valid Jinja",
    "x" * (2**20 + 1): "it has 1048577 characters",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_template_that_cannot_be_used_is_refused(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(L2PDError, match=rf"chat_template.jinja: .*({TEMPLATES[template]})"):
        load(folder)
    assert any("chat_template.jinja: " in each for each in find_checkpoint(str(folder)).problems)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('not for\nyou') }}", "not for you"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ missing.attribute }}", "missing"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            f"runs over {MOST_LINES} lines",
        ),
    ],
)
def test_a_template_that_fails_when_it_is_used(folder: Path, template: str, words: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    _, tokenizer = load(folder)
    with pytest.raises(L2PDError, match=f"^the tokenizer's chat template.*{words}"):
        encode_prompts(tokenizer, parse_prompts(["Hello"], "here"))


DOUBLED = "{% set x = x ~ x %}" * 40
HUNGRY = {
    "doubled": "{% set x = 'abc' %}" + DOUBLED,
    "doubled in a loop": "{% set n = namespace(x='abc') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "sum": "{% set x = 'abc' %}" + DOUBLED.replace("~", "+"),
    "lists": "{% set x = ['abc'] %}" + DOUBLED.replace("~", "+"),
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format operator": "{{ '%999999999d' % 1 }}",
    "format method": "{{ '{:999999999}'.format(1) }}",
    "product": "{% set n = 99999 %}{{ messages[0].content * n * n }}",
    "product of a list": "{% set n = 99999 %}{{ [1] * n * 99 * 99 }}",
    "range": "{% set x = (range(99999) | list) * 9999 %}",
    "padded": "{% set n = '999999999' | int %}{{ 'x'.ljust(n) }}",
    "centred": "{{ 'x' | center('999999999' | int) }}",
    "replaced": "{% set x = 'ab' * 50000 %}{{ x.replace('a', x) }}",
    "joined": "{% set x = 'ab' * 50000 %}{{ x.join(range(99999) | map('string')) }}",
    "indented": "{{ ('a\n' * 50000) | indent(99999) }}",
    "tabs": "{{ ('\t' * 50000).expandtabs(99999) }}",
    "printed": "{% for i in range(90000) %}{{ messages[0].content * 99 }}{% endfor %}",
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
@pytest.mark.parametrize("template", HUNGRY.values(), ids=HUNGRY)
def test_a_template_does_not_fill_the_memory(tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(L2PDError, match=r"^the tokenizer's chat template") as raised:
        rendered(tokenizer, [{"role": "user", "content": "Hello " * 20}])
    assert str(raised.value).isprintable()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 2**10  # of KiB
    tokenizer.chat_template = "{{ messages[0].content }}"  # and the next one is rendered
    assert rendered(tokenizer, [{"role": "user", "content": "Hi"}]) == "Hi"


def test_a_template_that_does_not_end_is_stopped(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(chat_templates, "MOST_SECONDS", 0.2)
    tokenizer.chat_template = "{{ range(99999) | map('string') | join | length }}" * 5000
    with pytest.raises(L2PDError, match=r"chat template runs for more than 0\.2 seconds"):
        rendered(tokenizer, [{"role": "user", "content": "Hello"}])


def test_a_rendered_text_that_is_too_long_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0].content * 99999 }}"
    with pytest.raises(L2PDError, match="writes more than 4194304 characters"):
        rendered(tokenizer, [{"role": "user", "content": "x" * 50}])
    tokenizer.chat_template = "{{ messages[0].content }}"
    text = "\ud800 and " + "\u00e4" * (2**22 - 6)
    assert rendered(tokenizer, [{"role": "user", "content": text}]) == text
    texts = [[{"role": "user", "content": str(i)}] for i in range(300)]
    assert all_rendered(tokenizer, texts) == [str(i) for i in range(300)]
    assert all_rendered(tokenizer, []) == []


@pytest.fixture
def tokenizer():
    return copy.deepcopy(load("tiny-llada")[1])


def test_correct_templates_are_accepted(folder: Path) -> None:
    for checkpoint in ("tiny-llada", "tiny-sdar", folder):
        _, tokenizer = load(checkpoint)
        messages = [{"role": "user", "content": "Hello"}]
        assert rendered(tokenizer, messages) == tokenizer.apply_chat_template(
            messages, tokenize=False
        )
    assert template_problem("{% generation %}{{ 'a' * 4 }}{% endgeneration %}{% break %}") == ""
    assert template_problem({"default": "a", "tools": "b"}) == ""
    assert template_problem([{"name": "default", "template": "a"}]) == ""
    assert template_problem(None) == ""
    assert "default" in template_problem({"tools": "b"})
    for wrong in (5, ["a"], [{"name": 5, "template": "a"}], {"default": 5}, True):
        assert template_problem(wrong), wrong


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer"),
        ("tokenizer.json", "[]", "tokenizer"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template|template"),
        (
            "special_tokens_map.json",
            "[1]",
            "special_tokens_map.json holds a list; expected an object",
        ),
        ("added_tokens.json", "", "added_tokens.json cannot be read"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(
    folder: Path, name: str, content: str, words: str
) -> None:
    (folder / name).write_text(content)
    if name == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(L2PDError, match=words) as raised:
        load(folder)
    assert str(raised.value).isprintable()
    find_checkpoint(str(folder))


def test_errors_of_the_commands_are_one_line(l2pd, folder: Path) -> None:
    change(folder / "config.json", d_model=float("nan"))
    ended = l2pd("generate", "Hello", "--model", folder)
    assert ended.returncode == 2
    *waiting, line = ended.stderr.splitlines()
    assert line.startswith("error: ") and "config.json: d_model = nan" in line
    assert all(said.startswith(("importing ", "loading ")) for said in waiting)
    ended = l2pd("doctor", folder)
    assert ended.returncode == 1 and ended.stderr == ""
    (folder / "config.json").write_text('{"model_type": ' + "[" * 10_000 + "]" * 10_000 + "}")
    ended = l2pd("doctor", "--json", folder)
    assert "nested deeper" in json.loads(ended.stdout)["problems"][0]


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfHello\r\nyou\n")
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == ["Hello", "you"]
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "Hello"}\n')
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == ["Hello"]
    assert [p.text for p in parse_prompts(["\ufeffHello\n"], "stdin")] == ["Hello"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Hello".encode("utf-16"), "p.jsonl cannot be read: it is UTF-16, expected UTF-8"),
        (b"\xff", "p.jsonl cannot be read: it is not UTF-8"),
        (b"[" * 100_000, "line 1: not valid JSON: it is nested deeper"),
        (
            b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}",
            "line 1: not valid JSON: Exceeds the limit",
        ),
        (b'{"prompt": "\\ud800"}', "line 1: not valid JSON: it holds half of a surrogate pair"),
        (
            b'{"prompt": "a", "prompt": "b"}',
            "line 1: not valid JSON: the key 'prompt' is given twice",
        ),
    ],
)
def test_a_file_that_is_not_a_prompt_file_is_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(L2PDError, match=words) as raised:
        read_prompts(tmp_path / "p.jsonl")
    assert str(raised.value).isprintable()
