"""The endpoint called from several threads."""

import time
from concurrent.futures import ThreadPoolExecutor

from .examples import IMAGE, TEXTS


def test_threads_do_not_disturb_one_another(endpoint):
    requests = [{"inputs": {"texts": [text * (i + 1) for text in TEXTS], "image": IMAGE}} for i in range(8)]
    expected = [endpoint(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(endpoint, requests * 3)) == expected * 3


def test_one_forward_pass_at_a_time(endpoint, monkeypatch):
    forward, running, together = endpoint.model.forward, [], []

    def watched(*args, **kwargs):
        running.append(None)
        time.sleep(0.01)
        together.append(len(running))
        running.pop()
        return forward(*args, **kwargs)

    monkeypatch.setattr(endpoint.model, "forward", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(endpoint, [{"inputs": {"text": text}} for text in TEXTS * 4]))
    assert together == [1] * 8
