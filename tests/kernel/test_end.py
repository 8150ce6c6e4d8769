# SPDX-License-Identifier: Apache-2.0
"""The end of a gateway on splice: nobody looks at maps that are gone."""

from __future__ import annotations

import threading
import urllib.request

import pytest

from sockgw.config import Accel, Address, Config
from sockgw.datapath import Datapath, Totals
from sockgw.gateway import Gateway

from .pairing import DEADLINE_S


@pytest.mark.usefixtures("_splice_works")
def test_scrape_that_outlasts_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps are not unmapped under a scrape: its read of them would be a segmentation fault."""
    is_inside, may_go_on = threading.Event(), threading.Event()
    closed_inside: list[bool] = []
    real_counters, real_close = Datapath.counters, Datapath.close

    def counters(datapath: Datapath) -> Totals:
        is_inside.set()
        may_go_on.wait(DEADLINE_S)
        totals = real_counters(datapath)
        is_inside.clear()
        return totals

    def close(datapath: Datapath) -> None:
        closed_inside.append(is_inside.is_set())
        may_go_on.set()
        if not closed_inside[0]:
            real_close(datapath)

    monkeypatch.setattr(Datapath, "counters", counters)
    monkeypatch.setattr(Datapath, "close", close)
    here = Address("127.0.0.1", 0)
    gateway = Gateway(
        Config(
            listen=here,
            backends=(Address("127.0.0.1", 1),),
            accel=Accel.SPLICE,
            metrics=here,
            threads=1,
        )
    )
    gateway.start()
    url = f"http://{gateway._metrics.address}/metrics"
    scrape = threading.Thread(target=lambda: urllib.request.urlopen(url).read())
    scrape.start()
    assert is_inside.wait(DEADLINE_S)
    gateway.close()
    threading.Timer(0.2, may_go_on.set).start()
    assert gateway.wait(DEADLINE_S)
    scrape.join()
    assert closed_inside == [False]
