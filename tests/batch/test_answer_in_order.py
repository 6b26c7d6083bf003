"""Rows are answered concurrently, and their results are written in order."""

import asyncio

from ovis_jax.batch.answer_in_order import RowResult, answer_in_order
from ovis_jax.batch.requests_file import BatchRow


class LastFirst:
    """Answers the first row only when all others are answered."""

    def __init__(self, num_rows):
        self.num_left, self.all_others = num_rows - 1, asyncio.Event()
        self.num_running = self.most_running = 0

    async def answer(self, row):
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        if row.value == 0:
            await self.all_others.wait()
        else:
            await asyncio.sleep(0)
            self.num_left -= 1
            if not self.num_left:
                self.all_others.set()
        self.num_running -= 1
        if row.value == 7:
            raise ZeroDivisionError("division by zero")
        return RowResult({"n": row.value}, row.value)

    def error_result(self, row, message, code):
        return {"n": row.value, "message": message, "code": code}


def test_results_wait_for_earlier_rows_but_rows_do_not(caplog):
    answered, results, read = [], [], []

    def rows():
        for n in range(20):
            assert n - len(answered) <= 3  # those that are read are answered or among three
            read.append(n)
            yield BatchRow(f"line {n + 1}", n)

    async def run():
        answerer = LastFirst(20)
        await answer_in_order(
            answerer,
            rows(),
            max_concurrent=3,
            on_answered=answered.append,
            on_result=results.append,
        )
        return answerer.most_running

    assert asyncio.run(run()) == 3 and len(read) == 20
    assert answered[-1] == 0 and sum(answered) == sum(range(20)) - 7
    message = "line 8: internal error: ZeroDivisionError('division by zero')"
    assert results[7] == {"n": 7, "message": message, "code": "internal_error"}
    assert "line 8 failed; the others continue" in caplog.text
    assert [result["n"] for result in results] == list(range(20))
