"""Odd requests to the pages' routes."""

import math
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from lab.soak.pages import ask_often


def test_odd_requests_are_answered_and_leave_no_traceback(server):
    mark = server.mark()
    statuses, faults = ask_often(server.url, server.folder / "input" / "soak", "make test", 300)
    assert faults == []
    assert "send" in server.post("/facelora/check", {"folder": "anna", "resolution": math.inf})["error"]
    broken = Request(server.url + "/facelora/photos", b"", {"Content-Type": "multipart/form-data; boundary=a"})
    with pytest.raises(HTTPError, match="400"):
        urlopen(broken)
    assert statuses[200] > 30 < statuses[404]
    assert "Traceback" not in server.log(mark)
