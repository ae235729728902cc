"""OpenAI's transcriptions: formats, batches of several clients, limits, and bad uploads."""

from __future__ import annotations

import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile


def tone(code: int, seconds: float) -> np.ndarray:
    """int16 audio that is ``code`` all along."""
    return np.full(int(16000 * seconds), code, np.int16)


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def test_the_formats_of_openai(serving):
    server, audio = serving(), wav(tone(7, 1.5))
    assert json.loads(server.post(audio, model="whisper-1")[1]) == {"text": "code 7"}
    assert server.post(audio, response_format="text") == (200, "code 7\n")
    srt = "1\n00:00:00,000 --> 00:00:01,500\ncode 7\n"
    assert server.post(audio, response_format="srt") == (200, srt)
    vtt = "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\ncode 7\n"
    assert server.post(audio, response_format="vtt") == (200, vtt)
    status, body = server.post(audio, response_format="verbose_json", language="en")
    values = json.loads(body)
    assert status == 200 and values["duration"] == 1.5 and values["language"] == "en"
    (segment,) = values["segments"]
    assert (segment["start"], segment["end"], segment["text"]) == (0.0, 1.5, "code 7 en")


def test_files_in_several_languages_share_a_batch(serving):
    server = serving()
    server.files.pause = 0.3
    langs = ["en", "zh", "", "en", "", "zh"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda i: server.post(wav(tone(i, 0.5)), language=langs[i]), range(6))
        )
    texts = [json.loads(body)["text"] for _, body in answers]
    assert texts == [f"code {i} {lang}".rstrip() for i, lang in enumerate(langs)]
    assert max(server.files.batches) > 1
    status, code, message = server.error(wav(tone(1, 0.5)), language="fr")
    assert (status, code) == (400, "unknown_language") and "give one of en, zh" in message


def test_files_of_several_clients_are_transcribed_together_and_not_mixed_up(serving):
    server = serving()
    server.files.pause = 0.3
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda code: server.post(wav(tone(code, 0.5))), range(1, 17)))
    assert [json.loads(body)["text"] for _, body in answers] == [f"code {c}" for c in range(1, 17)]
    assert max(server.files.batches) > 1 and sum(server.files.batches) == 16


def test_a_bad_file_and_a_fault_harm_no_other(serving):
    server = serving()
    server.files.pause = 0.2
    codes = [1, 666, 2, 667, 3, 4]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda code: server.post(wav(tone(code, 0.5))), codes))
    by_code = dict(zip(codes, answers, strict=True))
    for code in (1, 2, 3, 4):
        assert json.loads(by_code[code][1])["text"] == f"code {code}"
    assert by_code[666][0] == 400 and "the file is damaged" in by_code[666][1]
    assert "dsasr-serve" not in by_code[666][1]
    assert by_code[667][0] == 500 and "try again" in by_code[667][1]
    assert json.loads(server.get("/healthz")[1])["status"] == "ok"


@pytest.mark.parametrize(
    "audio,name,words",
    [
        (b"this is no audio at all", "a.wav", "is no audio"),
        (b"", "a.wav", "is no audio"),
        (b"text", "a.txt", "is no audio"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "a.wav", "is no audio"),
    ],
)
def test_what_is_no_audio_is_named(serving, audio, name, words):
    status, code, message = serving().error(audio, name)
    assert (status, code) == (400, "bad_audio") and words in message


def test_a_file_without_samples_is_named(serving):
    status, code, message = serving().error(wav(np.zeros(0, np.int16)))
    assert (status, code) == (400, "no_samples") and "no samples" in message


@pytest.mark.parametrize(
    "fields,code",
    [
        ({"response_format": "xml"}, "bad_format"),
        ({"temperature": "0.5"}, "no_temperature"),
        ({"prompt": "Hello"}, "no_prompt"),
        ({"stream": "true"}, "no_stream"),
        ({"langage": "en"}, "unknown_field"),
    ],
)
def test_settings_without_an_effect_are_refused(serving, fields, code):
    status, found, message = serving().error(wav(tone(1, 0.5)), **fields)
    assert (status, found) == (400, code) and message


def test_a_form_without_a_file_and_no_form_are_named(serving):
    server = serving()
    assert server.error(None, model="a")[:2] == (400, "no_file")
    status, body = server.post(b"", headers={"content-type": "audio/wav"})
    assert status == 400 and json.loads(body)["error"]["code"] == "no_file"


def test_too_large_and_too_long(serving):
    server = serving(body_mb=0.1, audio_seconds=2)
    assert server.error(wav(tone(1, 10)))[:2] == (413, "too_large")
    assert server.error(wav(tone(1, 2.5)))[:2] == (413, "too_long")
    assert server.post(wav(tone(1, 1.9)))[0] == 200


def test_a_full_queue_says_when_to_come_again(serving):
    server = serving(waiting=2)
    server.files.pause = 1.0
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda code: server.post(wav(tone(code, 0.2))), range(1, 9)))
    statuses = sorted(status for status, _ in answers)
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    assert server.post(wav(tone(9, 0.2)))[0] == 200  # places are given back


def test_a_client_that_stops_sending_or_closes_early_leaves_nothing(serving):
    server = serving(idle_seconds=0.5)
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        b"content-type: multipart/form-data; boundary=x\r\ncontent-length: 1000\r\n\r\n--x\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(head)
        answer = silent.recv(4096)
        while b"stopped_sending" not in answer and (more := silent.recv(4096)):
            answer += more
    assert b" 408 " in answer.split(b"\r\n")[0] and b"stopped_sending" in answer
    with socket.create_connection(("127.0.0.1", server.port)) as gone:
        gone.sendall(head)
    assert server.post(wav(tone(3, 0.2)))[0] == 200
    deadline = time.monotonic() + 10
    while "dsasr_files_waiting 0.0" not in server.get("/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_health_and_models(serving):
    server = serving()
    server.post(wav(tone(7, 1.5)))
    server.post(b"nothing")
    status, text = server.get("/metrics")
    assert status == 200 and 'dsasr_requests_total{status="200"} 1.0' in text
    assert 'dsasr_client_errors_total{code="bad_audio"} 1.0' in text
    assert 'dsasr_audio_seconds_total{kind="file"} 1.5' in text
    assert json.loads(server.get("/v1/models")[1])["data"][0]["id"] == "stand-in"
    assert server.get("/nothing")[0] == 404 and server.get("/page/../app.py")[0] == 404
    assert "microphone" in server.get("/")[1] and "AudioContext" in server.get("/page/page.js")[1]


def test_pages_of_other_sites_may_not_use_it(serving):
    server, audio = serving(), wav(tone(1, 0.2))
    assert server.post(audio, headers={"origin": "https://evil.example"})[0] == 403
    assert server.post(audio, headers={"host": "evil.example"})[0] == 403
    assert server.post(audio, headers={"origin": server.url})[0] == 200
