"""`vlv data caption` against a real server that is slow, fails, limits rates, cuts answers, and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import model_server
from tests.conftest import ROOT
from tests.model_server import TOKENS, ModelServer
from vlv.data.caption_api.budget import Prices
from vlv.data.caption_api.client import EndpointError, Question, parse
from vlv.data.caption_api.relabel import CaptionOptions, CaptionReport, caption_images
from vlv.data.import_.importer import Wanted, import_images
from vlv.data.import_.recipe import Recipe
from vlv.data.readers.formats import ReadOptions
from vlv.data.shards import DataError

EACH = Prices(prompt=900.0, completion=1000.0)  # an answer costs 0.9 + 0.1 = 1


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def question(server: ModelServer, **changes: Any) -> Question:
    plain = Question(server.url, "some-model", "Describe.", max_tokens=100, timeout=2.0, retries=4, first_wait=0.01)
    return replace(plain, **changes)


def caption(source: Path, output: Path, server: ModelServer, **changes: Any) -> CaptionReport:
    run = CaptionOptions(question(server), concurrency=4, reading=ReadOptions(caption_column="none"))
    return caption_images(source, output, replace(run, **changes))


def captions(output: Path) -> dict[str, str]:
    return {row["name"]: row["caption"] for row in pq.read_table(output / "captions.parquet").to_pylist()}


def unusable(output: Path) -> dict[str, str]:
    lines = (output / "unusable.jsonl").read_text().splitlines()
    return {line["name"]: line["kind"] for line in map(json.loads, lines)}


def expected(*numbers: int) -> dict[str, str]:
    return {f"{i:02d}.png": model_server.caption(i) for i in numbers}


def test_every_image_ends_with_a_caption_or_a_reason(tmp_path: Path) -> None:
    script = {
        1: ["500", "503"], 2: ["cut", "cut"], 3: ["garbage", "odd"], 4: ["hang"], 5: ["429:0.2"],
        6: ["refusal"], 7: ["words"], 8: ["filter"], 9: ["empty"], 10: ["null"], 11: ["length"], 12: ["400"],
        13: ["500"] * 9, 14: ["trickle"], 15: ["parts"],
    }  # fmt: skip
    source = model_server.write_images(tmp_path / "images", 18)
    (source / "broken.png").write_bytes(b"no image")
    (source / "copy.png").write_bytes((source / "00.png").read_bytes())
    with ModelServer(script) as server:
        report = caption(source, tmp_path / "out", server, question=question(server, timeout=0.6))
    kept = captions(tmp_path / "out")
    twin = kept.pop("00.png", None) or kept.pop("copy.png")  # one file under two names: one request
    assert twin == model_server.caption(0)
    assert kept == expected(1, 2, 3, 4, 5, 14, 15, 16, 17)
    assert unusable(tmp_path / "out") == {
        "06.png": "refused", "07.png": "refused", "08.png": "refused", "09.png": "empty", "10.png": "empty",
        "11.png": "cut",
    }  # fmt: skip
    # two cut, two garbled, one hanging and one trickling answer may have been billed
    assert report.counts == {
        "caption": 10, "refused": 3, "empty": 2, "cut": 1, "rejected": 1, "failed": 1, "unreadable": 1, "repeated": 1,
        "lost": 6,
    }  # fmt: skip
    assert not report.complete
    assert report.tokens == [16 * TOKENS[0], 16 * TOKENS[1]]
    assert server.asked.count(13) == 5  # one attempt and four retries
    assert server.asked.count(12) == 1
    assert {name for name, reason, _ in report.notes if reason == "failed"} == {"13.png"}


def test_a_second_run_sends_only_images_without_an_answer(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 8)
    with ModelServer({2: ["refusal"], 3: ["500"] * 9}) as server:
        caption(source, tmp_path / "out", server, question=question(server, retries=1))
        model_server.write_images(source, 10)
        server.asked.clear()
        server.script.clear()
        report = caption(source, tmp_path / "out", server)
        assert sorted(server.asked) == [3, 8, 9]
        assert report.counts == {"caption": 3, "answered_before": 7} and report.complete
        assert unusable(tmp_path / "out") == {"02.png": "refused"}
        server.asked.clear()
        caption(source, tmp_path / "out", server, again=True)
        assert server.asked == [2]
    assert captions(tmp_path / "out") == expected(*range(10)) and unusable(tmp_path / "out") == {}


def test_all_threads_wait_after_a_retry_after(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 12)
    with ModelServer({0: ["429:0.5"]}, pause=0.02) as server:
        report = caption(source, tmp_path / "out", server)
        told = next(at for at, what in server.times if what.startswith("429"))
    assert report.counts == {"caption": 12}
    assert server.most_at_once == 4
    # requests already in progress when the answer came (20 ms later) are allowed
    assert not [at for at, _ in server.times if told + 0.1 < at < told + 0.5]
    with ModelServer({0: ["429:7200"]}) as server, pytest.raises(EndpointError, match="asks to wait 7200 s"):
        caption(source, tmp_path / "other", server)


def test_a_retry_after_can_be_a_date(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 1)
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    with ModelServer({0: [f"429:{date}"]}) as server:
        caption(source, tmp_path / "out", server)
        assert server.times[1][0] - server.times[0][0] > 0.5


# --- kills


def command(source: Path, output: Path, server: ModelServer) -> list[str]:
    where = [str(source), "-o", str(output), "--base-url", server.url, "--model", "some-model"]
    return [sys.executable, "-m", "vlv", "data", "caption", *where, "--concurrency", "4"]


def lines(output: Path) -> list[dict[str, Any]]:
    path = output / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def until(condition: Any, process: "subprocess.Popen[bytes]") -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_after_a_kill_no_answered_image_is_sent_again(tmp_path: Path) -> None:
    source, output = model_server.write_images(tmp_path / "images", 14), tmp_path / "out"
    with ModelServer(hold_after=6) as server:
        child = subprocess.Popen(command(source, output, server), cwd=ROOT, stdout=subprocess.DEVNULL)
        # All six answers are in the journal, and all connections wait for other images.
        until(lambda: len(lines(output)) == 7 and server.at_once == 4, child)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        before = list(server.answered)
    assert len(set(before)) == 6
    with (output / "journal.jsonl").open("a") as journal:
        journal.write('{"sha256": "cut in the mid')  # as a kill during a write leaves it
    with ModelServer() as server:
        done = subprocess.run(command(source, output, server), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted([*server.asked, *before]) == list(range(14))
    assert "answered_before 6, caption 8" in done.stdout
    assert captions(output) == expected(*range(14))


@pytest.mark.slow
def test_an_interrupt_keeps_the_answers_in_progress(tmp_path: Path) -> None:
    source, output = model_server.write_images(tmp_path / "images", 20), tmp_path / "out"
    with ModelServer(pause=0.4) as server:
        child = subprocess.Popen(command(source, output, server), cwd=ROOT, stdout=subprocess.DEVNULL)
        until(lambda: len(server.asked) >= 6, child)
        child.terminate()
        assert child.wait() == 128 + signal.SIGTERM
        answered = sorted(server.answered)
    assert 4 <= len(answered) < 20
    assert captions(output) == expected(*answered)


# --- money


def test_the_price_cap_is_not_exceeded_and_can_be_raised(tmp_path: Path) -> None:
    source, output = model_server.write_images(tmp_path / "images", 20), tmp_path / "out"
    with ModelServer({3: ["cut"]}, pause=0.02) as server:
        report = caption(source, output, server, prices=EACH, cap=8.0, concurrency=8)
        assert report.stopped is not None and "price cap of 8" in report.stopped and not report.complete
        billed = len(server.answered)
        assert report.cost <= 8.0 and billed >= 3
        assert server.times[1][0] - server.times[0][0] > 0.02  # the first was sent alone, to learn the price of one
        more = caption(source, output, server, prices=EACH, cap=100.0, concurrency=8)
    assert more.counts["answered_before"] == billed and more.complete
    assert sorted(server.answered) == list(range(20))
    assert more.cost == pytest.approx(20 + sum(line["cost"] for line in lines(output)[1:] if line["kind"] == "lost"))
    assert captions(output) == expected(*range(20))


def test_a_limit_sends_only_a_few_images(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 12)
    with ModelServer() as server:
        report = caption(source, tmp_path / "out", server, limit=3)
    assert len(server.asked) == 3 and report.counts["caption"] == 3 and report.stopped == "the limit of 3 images"


# --- fatal errors


@pytest.mark.parametrize(("status", "message"), [(401, "--key-env"), (404, "--base-url"), (402, "credit")])
def test_a_fatal_error_of_the_endpoint_ends_the_run(tmp_path: Path, status: int, message: str) -> None:
    source = model_server.write_images(tmp_path / "images", 20)
    with ModelServer({i: [str(status)] * 9 for i in range(5, 20)}) as server:
        with pytest.raises(EndpointError, match=message):
            caption(source, tmp_path / "out", server, concurrency=2)
        assert captions(tmp_path / "out") == expected(*(i for i in server.answered))  # paid answers are kept
    assert len(server.asked) < 12


def test_an_endpoint_that_is_down_or_rejects_everything_ends_the_run(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 24)
    with ModelServer() as server:
        pass  # its port is closed now
    with pytest.raises(EndpointError, match="10 images in a row got no answer"):
        caption(source, tmp_path / "out", server, question=question(server, retries=1))
    with ModelServer({i: ["400"] for i in range(24)}) as server, pytest.raises(EndpointError, match="rejects every"):
        caption(source, tmp_path / "out", server)
    with pytest.raises(EndpointError, match="http://"):
        caption(source, tmp_path / "out", server, question=replace(question(server), base_url="localhost:8000/v1"))


def test_answers_to_another_question_are_not_mixed(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 2)
    with ModelServer() as server:
        caption(source, tmp_path / "out", server)
        with pytest.raises(DataError, match=r"another question \(prompt differ\)"):
            caption(source, tmp_path / "out", server, question=question(server, prompt="Other."))
        assert len(server.asked) == 2


def test_the_key_is_sent_and_never_written(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 2)
    key = "sk-very-secret"
    with ModelServer({1: ["refusal"]}) as server:
        environment = {**os.environ, "SOME_KEY": key + "\n"}
        arguments = [*command(source, tmp_path / "out", server), "--key-env", "SOME_KEY"]
        arguments += ["--extra", '{"max_tokens": null, "max_completion_tokens": 9, "temperature": 0}']
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert server.keys == {f"Bearer {key}"}
    assert server.requests[0]["max_completion_tokens"] == 9 and "max_tokens" not in server.requests[0]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert key.encode() not in written and key not in done.stdout + done.stderr
    assert "refused 1: listed in" in done.stdout


# --- into the data


def test_captions_reach_the_data(tmp_path: Path) -> None:
    source = model_server.write_images(tmp_path / "images", 6)
    (source / "01.txt").write_text("Somebody's own words.")
    with ModelServer({2: ["words"]}) as server:
        report = caption(source, tmp_path / "out", server, sidecars=True)
    assert report.exported is not None
    assert (report.exported.captions, report.exported.sidecars, report.exported.sidecars_there) == (5, 4, 1)
    assert (source / "01.txt").read_text() == "Somebody's own words."
    assert (source / "03.txt").read_text() == model_server.caption(3) + "\n"
    assert not (source / "02.txt").exists()
    wanted = Wanted(Recipe(32, 32, 2.0), 10)
    assert import_images(source, tmp_path / "data", wanted).counts()["with_caption"] == 5
    wanted = replace(wanted, captions=tmp_path / "out" / "captions.parquet")
    import_images(source, tmp_path / "data", wanted)
    table = pq.read_table(tmp_path / "data" / "train" / "samples.parquet").to_pylist()
    found = {row["url"]: row["caption"] for row in table}
    assert found.items() <= (expected(0, 1, 3, 4, 5) | {"02.png": None}).items()
    with ModelServer() as server:  # our own shards are also a source
        report = caption(tmp_path / "data", tmp_path / "again", server)
    assert report.counts == {"caption": 6}


@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't assist with that.", "I\u2019m unable to describe people.", "Sorry, no.",
    "I cannot describe this image.", "As an AI, I do not see.", "Unfortunately, I can't view images.",
])  # fmt: skip
def test_verbal_refusals_never_become_captions(text: str) -> None:
    assert parse(json.dumps(model_server.completion(text)).encode()).kind == "refused"


@pytest.mark.parametrize("text", [
    "A sign reads \"I'm sorry, we are closed\".", "Icebergs drift in a bay.", "An unfortunately placed sign.",
])  # fmt: skip
def test_captions_are_not_mistaken_for_refusals(text: str) -> None:
    assert parse(json.dumps(model_server.completion(text)).encode()).kind == "caption"


def test_a_lone_surrogate_in_an_answer_is_replaced() -> None:
    body = b'{"choices": [{"message": {"content": "A dog \\ud83d runs."}, "finish_reason": "stop"}]}'
    found = parse(body)
    assert found.kind == "caption" and found.text == "A dog \N{REPLACEMENT CHARACTER} runs."
    assert found.text.encode("utf-8")
