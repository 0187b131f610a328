"""The server over loopback: answers, streams, adapters that come and go, and what is refused."""

import http.client
import json
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import torch
import uvicorn
from served_models import DIMS, llama, random_slices, with_slices
from transformers import ContinuousBatchingConfig, GenerationConfig

from s2kernels.adapter import write_adapter
from s2kernels.cli.models import load_tokenizer
from s2kernels.serve import Serving
from s2kernels.serve.engine import Detokenizer, StopTexts
from s2kernels.serve.openai import application
from s2kernels.serve.sampling import complete, configure

NAMES = ["a0", "a1", "a2"]
CONTEXT = 200
CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}b:"


@pytest.fixture(scope="module")
def model():
    return llama(vocab_size=259)


@pytest.fixture(scope="module")
def adapters(model):
    return {name: random_slices(model, seed, list(DIMS)) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def port(model, adapters, tokenizer):
    """That of a running server."""
    serving = Serving(model, pool_bytes=2**22)
    for name, slices in adapters.items():
        serving.register(name, slices)
    generation = GenerationConfig(pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=128, page_size=8, max_batch_tokens=64)
    configure(generation, batching)
    listening = socket.create_server(("127.0.0.1", 0))
    with serving.continuous_batching(generation, batching) as manager:
        complete(manager)
        app = application(serving, manager, tokenizer, "base", CONTEXT)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        yield listening.getsockname()[1]
        left = [manager._requests._adapters, manager._requests._held]
        left.append(manager.output_router.result_handlers)
        deadline = time.monotonic() + 20
        while any(left):  # cancelled requests leave nothing behind
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert not serving.store.is_in_flight()
        assert manager.output_router.output_queue.empty()
        server.should_exit = True
        thread.join()
    serving.close()


@pytest.fixture(scope="module")
def alone(model, adapters, tokenizer):
    written = {"base": llama(vocab_size=259)}
    written |= {name: with_slices(written["base"], adapters[name]) for name in NAMES}

    def answer(name, prompt, num=16):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = written[name].generate(ids, do_sample=False, max_new_tokens=num, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def call(port, method, path, body=None, raw=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, json.loads(content) if content.startswith("{") else content


def complete_text(port, model, prompt, **options):
    body = dict(model=model, prompt=prompt, temperature=0) | options
    status, content = call(port, "POST", "/v1/completions", body)
    assert status == 200, content
    return content


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_completions_are_those_of_the_adapter(port, alone, name):
    content = complete_text(port, name, "Two and two", max_tokens=20)
    (choice,) = content["choices"]
    assert choice["text"] == alone(name, "Two and two", 20)
    assert choice["finish_reason"] == "length" and content["model"] == name
    assert content["object"] == "text_completion"
    # a byte is a token, and there is one at the end of a prompt
    assert content["usage"] == dict(prompt_tokens=12, completion_tokens=20, total_tokens=32)


@pytest.mark.slow
def test_many_at_once(port, alone):
    wanted = {(name, f"prompt {i}"): None for i in range(6) for name in ("base", *NAMES)}
    for key in wanted:
        wanted[key] = alone(*key)
    got = {}

    def ask(key):
        got[key] = complete_text(port, *key)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(key,)) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


def test_a_list_of_prompts_and_of_tokens(port, alone, tokenizer):
    content = complete_text(port, "a1", ["one", "three"])
    assert [c["text"] for c in content["choices"]] == [alone("a1", p) for p in ("one", "three")]
    assert [c["index"] for c in content["choices"]] == [0, 1]
    content = complete_text(port, "a1", tokenizer("one")["input_ids"])
    assert content["choices"][0]["text"] == alone("a1", "one")


def stream(port, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in response.read().decode().split("\n\n") if line]
    connection.close()
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_streams(port, alone):
    body = dict(model="a2", prompt="Hello", temperature=0, max_tokens=30, stream=True)
    events = stream(port, "/v1/completions", body)
    assert "".join(e["choices"][0]["text"] for e in events) == alone("a2", "Hello", 30)
    reasons = [e["choices"][0]["finish_reason"] for e in events]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    assert len({e["id"] for e in events}) == 1


def test_a_client_that_goes_cancels_its_request(port):
    """The fixture waits for nothing to be in flight in the end."""
    for streaming in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = dict(model="a0", prompt="x", max_tokens=190, stream=streaming)
        headers = {"Content-Type": "application/json; charset=utf-8"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if streaming:
            connection.getresponse().read(50)
        connection.close()


@pytest.mark.slow
def test_chat(port, alone, tokenizer, monkeypatch):
    body = dict(model="a1", messages=[dict(role="user", content="hi")], temperature=0)
    status, content = call(port, "POST", "/v1/chat/completions", body)
    assert status == 400 and "no chat template" in content["error"]["message"]
    monkeypatch.setattr(tokenizer, "chat_template", CHAT, raising=False)
    status, content = call(port, "POST", "/v1/chat/completions", body | dict(max_tokens=9))
    assert status == 200, content
    message = content["choices"][0]["message"]
    ids = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    want = complete_text(port, "a1", ids, max_tokens=9)["choices"][0]["text"]
    assert message == dict(role="assistant", content=want)
    events = stream(port, "/v1/chat/completions", body | dict(max_tokens=9, stream=True))
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == want
    assert events[0]["object"] == "chat.completion.chunk"


def test_stop_texts(port, alone):
    text = alone("a0", "abc", 40)
    stop = text[7:9]
    body = dict(max_tokens=40, stop=["\0never", stop])
    content = complete_text(port, "a0", "abc", **body)
    assert content["choices"][0]["text"] == text[: text.index(stop)]
    assert content["choices"][0]["finish_reason"] == "stop"


def test_sampling_follows_the_parameters(port):
    texts = {
        temperature: [
            complete_text(port, "a0", "abc", temperature=temperature, top_p=top_p)["choices"][0][
                "text"
            ]
            for _ in range(4)
        ]
        for temperature, top_p in ((0, 1.0), (2.0, 1.0), (1.99, 1e-6))
    }
    assert len(set(texts[0])) == 1
    assert len(set(texts[2.0])) > 1
    assert set(texts[1.99]) == set(texts[0])  # so small a share is the best token alone


def test_adapters_come_and_go(port, model, tmp_path):
    base = llama(vocab_size=259)
    slices = random_slices(base, 50)
    write_adapter(tmp_path / "new", slices, {})
    status, content = call(
        port, "POST", "/v1/adapters", dict(name="team/new", path=str(tmp_path / "new"))
    )
    assert status == 200, content
    listed = {m["id"]: m for m in call(port, "GET", "/v1/models")[1]["data"]}
    assert set(listed) == {"base", *NAMES, "team/new"} and listed["team/new"]["parent"] == "base"
    ids = load_tokenizer("bytes")("hey", return_tensors="pt")["input_ids"]
    out = with_slices(base, slices).generate(ids, do_sample=False, max_new_tokens=16)
    want = load_tokenizer("bytes").decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert complete_text(port, "team/new", "hey")["choices"][0]["text"] == want
    assert call(port, "DELETE", "/v1/adapters/team/new")[0] == 200
    assert call(port, "POST", "/v1/completions", dict(model="team/new", prompt="x"))[0] == 404
    assert call(port, "DELETE", "/v1/adapters/team/new")[0] == 404


OTHER_BASE = random_slices(llama(vocab_size=259, seed=9), 1)
BAD = [
    ("/v1/completions", dict(prompt=""), None),  # the tokenizer ends it: one token
    ("/v1/completions", dict(), 400),
    ("/v1/completions", dict(prompt=[]), 400),
    ("/v1/completions", dict(prompt=[[]]), 400),
    ("/v1/completions", dict(prompt=[1, "x"]), 400),
    ("/v1/completions", dict(prompt=[-1]), 400),
    ("/v1/completions", dict(prompt=[259]), 400),
    ("/v1/completions", dict(prompt=[True]), 400),
    ("/v1/completions", dict(prompt=[2**70]), 400),
    ("/v1/completions", dict(prompt="x", model="no"), 404),
    ("/v1/completions", dict(prompt="x", model=["a0"]), 404),
    ("/v1/completions", dict(prompt="x", max_tokens=0), 400),
    ("/v1/completions", dict(prompt="x", max_tokens=1.5), 400),
    ("/v1/completions", dict(prompt="x", max_tokens=True), 400),
    ("/v1/completions", dict(prompt="x", max_tokens=10**30), 400),
    ("/v1/completions", dict(prompt="x" * 300), 400),
    ("/v1/completions", dict(prompt="x", temperature=-1), 400),
    ("/v1/completions", dict(prompt="x", temperature="hot"), 400),
    ("/v1/completions", dict(prompt="x", top_p=0), 400),
    ("/v1/completions", dict(prompt="x", n=2), 400),
    ("/v1/completions", dict(prompt="x", seed=1), 400),
    ("/v1/completions", dict(prompt="x", stop=3), 400),
    ("/v1/completions", dict(prompt="x", stop=[""]), 400),
    ("/v1/completions", dict(prompt="x", stream="yes"), 400),
    ("/v1/completions", dict(prompt=["x", "y"], stream=True), 400),
    ("/v1/completions", dict(prompt=[259], stream=True), 400),
    ("/v1/chat/completions", dict(messages=[]), 400),
    ("/v1/chat/completions", dict(messages=[dict(role="user")]), 400),
    ("/v1/chat/completions", dict(messages="hi"), 400),
    ("/v1/adapters", dict(name="x"), 400),
    ("/v1/adapters", dict(name="x", path="/no/such/folder"), 400),
    ("/v1/adapters", dict(name="a0", path="/no/such/folder"), 400),
    ("/v1/adapters", dict(name="base", path="/no/such/folder"), 400),
    ("/v1/adapters", dict(name=3, path="x"), 400),
    ("/v1/nothing", dict(), 404),
]


@pytest.mark.parametrize(("path", "body", "status"), BAD, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_a_4xx_that_says_why(port, path, body, status):
    got, content = call(port, "POST", path, body)
    assert got == (status or 200)
    if status:
        error = content["error"]
        assert error["message"] and error["code"] == status
        assert error["type"] == "invalid_request_error"
    assert call(port, "GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("raw", ["", "{", "[1]", "null", "\xff", '{"prompt": NaN}', "[" * 10**5])
def test_what_is_no_json_object_is_a_400(port, raw):
    assert call(port, "POST", "/v1/completions", raw=raw.encode("latin-1"))[0] == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_a_page_of_another_site_may_send_is_a_415(port, kind):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(dict(name="x", path="/tmp"))
    connection.request("POST", "/v1/adapters", body, {"Content-Type": kind})
    assert connection.getresponse().status == 415
    connection.close()


def test_a_body_may_not_be_endless(port):
    status, content = call(port, "POST", "/v1/completions", raw=b" " * (2**22 + 1))
    assert status == 413 and "4194304 bytes" in content["error"]["message"]


def test_a_wrong_method_is_a_405(port):
    assert call(port, "GET", "/v1/completions")[0] == 405


def test_an_adapter_of_another_base_is_refused(port, tmp_path):
    write_adapter(tmp_path / "other", OTHER_BASE, {})
    status, content = call(
        port, "POST", "/v1/adapters", dict(name="other", path=str(tmp_path / "other"))
    )
    assert status == 400 and "trained on another base" in content["error"]["message"]


def test_characters_come_whole(tokenizer):
    text = "naïve 日本 🙂 end"
    tokens, read, pieces = tokenizer(text)["input_ids"][:-1], Detokenizer(tokenizer), []
    for number in range(1, len(tokens) + 1):
        pieces.append(read.text(tokens[:number], number == len(tokens)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    cut = Detokenizer(tokenizer)
    pieces = [cut.text(tokens[:number], number == 3) for number in range(1, 4)]
    assert "".join(pieces) == "na\ufffd" or "".join(pieces) == "na"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_texts_are_found_across_pieces(size):
    stops, text = StopTexts(["END", "EX"]), "a EEN b EN END c EX"
    passed = ""
    for start in range(0, len(text), size):
        passed += stops.pass_on(text[start : start + size], start + size >= len(text))
        if stops.found:
            break
    assert passed == "a EEN b EN " and stops.found
    never = StopTexts(["END"])
    assert never.pass_on("EN", False) + never.pass_on("", True) == "EN" and not never.found


@pytest.mark.slow
def test_temperature_of_zero_is_the_best_token():
    from transformers.generation.logits_process import TemperatureLogitsWarper

    from s2kernels.serve.sampling import _Temperature

    scores = torch.randn(3, 11)
    arguments = torch.tensor([0.0, 1.0, 0.5]).view(torch.int32)
    got = _Temperature(TemperatureLogitsWarper(0.5))(scores, arguments)
    assert got[0].softmax(-1).max() == 1 and got[0].argmax() == scores[0].argmax()
    assert torch.equal(got[1], scores[1]) and torch.equal(got[2], scores[2] / 0.5)
