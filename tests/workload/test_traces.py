"""Readers of public traces; scaling, cutting and looping of a trace; its playback as an arrival process."""

import datetime
import gzip
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax import InputError
from qos_jax.io.text_files import MAX_TOKENS
from qos_jax.workload.trace_files import COLUMNS, read_trace
from qos_jax.workload.traces import ArrivalTrace, with_gaps

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
PLAIN = "arrival_s,prompt_tokens,output_tokens\n"


def mooncake(stamps):
    records = [{"timestamp": int(t), "input_length": j, "output_length": 1} for j, t in enumerate(stamps)]
    return "\n".join(map(json.dumps, records))


def line(**changes):
    return json.dumps({"timestamp": 0, "input_length": 1, "output_length": 1} | changes)


def turn(session, length=1, **time):
    return json.dumps({"session_id": session, "input_length": length, "output_length": 1} | time)


def trace_of(arrival_s, prompt_tokens=7, output_tokens=5):
    full = np.full(len(arrival_s), 1)
    return ArrivalTrace(np.array(arrival_s), full * prompt_tokens, full * output_tokens, "a test")


def assert_holds(trace, arrival_s, prompt_tokens, output_tokens):
    np.testing.assert_allclose(trace.arrival_s, arrival_s, rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(trace.prompt_tokens, prompt_tokens)
    np.testing.assert_array_equal(trace.output_tokens, output_tokens)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a text to a file and returns its path."""
    path = tmp_path_factory.mktemp("traces") / "trace"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_azure_times_count_from_the_first_request(written):
    rows = "2023-11-16 23:59:59.9000000,374,44\n2023-11-17 00:00:00.0000011,396,109\n2023-11-17 00:00:03,1,1\n"
    assert_holds(read_trace(written(AZURE + rows)), [0.0, 0.100001, 3.1], [374, 396, 1], [44, 109, 1])


def test_spend_logs_of_litellm_are_sorted_and_failed_requests_counted(written):
    rows = (
        "request_id,startTime,endTime,model,prompt_tokens,completion_tokens,spend\n"
        "c,2026-01-01T00:00:03.5Z,2026-01-01T00:00:04Z,m,30,0,0.1\n"
        "b,2026-01-01T00:00:02Z,2026-01-01T00:00:04Z,m,20,2,0.1\n"
        'a,"2026-01-01 00:00:00.5",2026-01-01T00:00:04Z,m,10,1,0.1\n'
    )
    trace = read_trace(written(rows), sort=True)
    assert_holds(trace, [0.0, 1.5], [10, 20], [1, 2])
    assert trace.num_skipped == 1
    with pytest.raises(InputError, match="line 4: startTime is before that of the request above it"):
        read_trace(written(rows))


def sglang(event, rid, time, *tokens):
    out = {"meta_info": dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True))} if tokens else None
    return json.dumps(
        {"timestamp": time, "event": f"request.{event}", "rid": rid, "obj": {}} | ({"out": out} if out else {})
    )


def test_the_request_log_of_sglang_joins_what_was_received_and_finished(written):
    log = [
        sglang("received", "a", "2026-01-01T10:00:00.250"),
        sglang("received", "b", "2026-01-01T10:00:01.250"),
        sglang("finished", "b", "2026-01-01T10:00:02.000", 20, 5),
        sglang("received", "c", "2026-01-01T10:00:02.500"),
        sglang("finished", "a", "2026-01-01T10:00:03.000", 10, 9),
    ]
    trace = read_trace(written("\n".join(log)))
    assert_holds(trace, [0.0, 1.0], [10, 20], [9, 5])
    assert trace.num_skipped == 1


@pytest.mark.parametrize("indent", [None, 2])
def test_the_result_of_a_benchmark(written, indent):
    found = {"backend": "vllm", "start_times": [70.5, 71.0, 73.0], "input_lens": [5, 6, 7], "output_lens": [1, 0, 3]}
    trace = read_trace(written(json.dumps(found | {"ttfts": [0.1, 0.0, 0.2]}, indent=indent)))
    assert_holds(trace, [0.0, 2.5], [5, 7], [1, 3])
    assert trace.num_skipped == 1
    with pytest.raises(InputError, match="must be a JSON object with the lists start_times, input_lens, output_lens"):
        read_trace(written(json.dumps(found | {"input_lens": [5]})), "benchmark")


def test_azure_of_2024_has_time_zones(written):
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 00:00:00.509930+00:00,2399,6\r\n"
    assert_holds(read_trace(written(AZURE + rows)), [0.0, 0.5], [2162, 2399], [5, 6])


def test_burstgpt_failures_are_left_out_and_counted(written):
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,30,0,30,API log\n118.5,GPT-4,417,276,693,API log\n"
    trace = read_trace(written(BURSTGPT + rows))
    assert_holds(trace, [5.0, 118.5], [472, 417], [18, 276])
    assert trace.num_skipped == 1


@pytest.mark.parametrize("stamps", [np.arange(10) * 3000, np.arange(10) * 2000, np.zeros(10, int)])
def test_mooncake_times_are_as_in_the_file(written, stamps):
    np.testing.assert_array_equal(read_trace(written(mooncake(stamps))).arrival_s, stamps / 1e3)


def test_rounded_times_are_spread_over_their_step_in_the_order_of_the_file(written):
    stamps = np.repeat([0, 3000, 5999, 9001], 500)  # the published times are rounded to 1 ms
    path = written(mooncake(stamps))
    trace = read_trace(path, spread_s=3.0)
    np.testing.assert_array_equal(trace.prompt_tokens, np.arange(2000))
    np.testing.assert_array_equal(trace.arrival_s // 3.0, np.repeat(np.arange(4), 500))
    within = np.histogram(trace.arrival_s % 3.0, 6)[0]
    assert within.min() > 250
    np.testing.assert_array_equal(read_trace(path, spread_s=3.0).arrival_s, trace.arrival_s)
    np.testing.assert_array_equal(read_trace(path).arrival_s, stamps / 1e3)


def test_steps_of_any_format_and_length(written):
    trace = read_trace(written(PLAIN + "0,1,1\n" * 3 + "60,1,1\n" * 3), spread_s=60.0)
    np.testing.assert_array_equal(trace.arrival_s // 60.0, [0, 0, 0, 1, 1, 1])
    assert trace.gaps_s.min() > 0
    with pytest.raises(InputError, match=r"line 3: the time 1.5 s is no multiple of 1 s.*--trace_spread"):
        read_trace(written(PLAIN + "0,1,1\n1.5,1,1\n"), spread_s=1.0)


@pytest.mark.parametrize(
    "argument", [{"spread_s": each} for each in (0.0, "3", True, 10**400)] + [{"format": ["azure"]}]
)
def test_an_argument_of_another_kind_is_refused(written, argument):
    with pytest.raises(InputError, match=f"{next(iter(argument))} (is|must be one of) "):
        read_trace(written(PLAIN + "0,1,1\n"), **argument)


def test_mooncake_lines_may_be_blank_and_have_other_fields(written):
    records = [{"timestamp": t, "input_length": 3, "output_length": 1, "hash_ids": []} for t in (0, 1234, 3000)]
    assert_holds(read_trace(written("\n".join(map(json.dumps, records)) + "\n\n")), [0.0, 1.234, 3.0], 3, 1)


requests = st.lists(
    st.tuples(st.floats(0, 1e9), st.integers(0, MAX_TOKENS), st.integers(0, MAX_TOKENS)), min_size=1, max_size=20
).map(lambda rows: np.array(sorted(rows)).T)


@settings(max_examples=50, deadline=None)
@given(requests, st.permutations(range(4)))
def test_what_was_written_is_read_back(written, columns, order):
    header = [*PLAIN.strip().split(","), "note"]
    cells = [[repr(float(t)), str(int(p)), str(int(d)), 'a "remark", quoted'] for t, p, d in columns.T]
    rows = [",".join('"' + row[k].replace('"', '""') + '"' for k in order) for row in [header, *cells]]
    trace = read_trace(written("\ufeff" + "\n".join(rows)), "csv")
    np.testing.assert_array_equal([trace.arrival_s, trace.prompt_tokens, trace.output_tokens], columns)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=20).map(sorted))
def test_azure_times_are_read_back_to_the_microsecond(written, microseconds):
    start = datetime.datetime(2023, 11, 16)
    times = [start + datetime.timedelta(microseconds=m) for m in microseconds]
    rows = [f"{t:%Y-%m-%d %H:%M:%S.%f}0,3,4" for t in times]
    trace = read_trace(written(AZURE + "\n".join(rows)))
    np.testing.assert_array_equal(np.rint(trace.arrival_s * 1e6), np.array(microseconds) - microseconds[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (PLAIN, "holds no request"),
        (BURSTGPT + "5,ChatGPT,472,0,472,API log\n", "holds no request but 1 that failed"),
        (BURSTGPT + "5,ChatGPT,472,nan,472,API log\n", "line 2: Response tokens is 'nan', must be a whole number"),
        ("a,b,c\n1,2,3\n", "no known trace begins with 'a,b,c'; columns must be those of azure: TIMESTAMP"),
        (PLAIN + "0,1,1\n\n1.0,two,1\n", "line 4: prompt_tokens is 'two', must be a whole number from 0 to 2147483647"),
        (PLAIN + "0,1,2.5\n", "line 2: output_tokens is '2.5', must be a whole number"),
        (PLAIN + f"0,1,{10**400}\n", "line 2: output_tokens is '1000.*, must be a whole number"),
        (PLAIN + "0,1,\n", "line 2: output_tokens is '', must be a whole number"),
        (PLAIN + "0,1,1\n1,1", "line 3: has 2 cells, must have 3"),
        (PLAIN + "0,1,024,5\n", "line 2: has 4 cells, must have 3"),
        (PLAIN + '0,"1,024",5\n', "line 2: prompt_tokens is '1,024', must be a whole number"),
        (PLAIN + "0,1_0,5\n", "line 2: prompt_tokens is '1_0', must be a whole number"),
        (PLAIN + "0,\u0661,5\n", "line 2: prompt_tokens is '\u0661', must be a whole number"),
        (PLAIN + '0,1,"5\n1,1,5\n2,1,5\n', "line 2: unexpected end of data"),
        (PLAIN + "0,1,1\n\0\0\n", "line 3: has 1 cells, must have 3"),
        ("arrival_s," + PLAIN + "0,0,1,1\n", "has the column arrival_s twice"),
        ("arrival_s,prompt_tokens\n0,1\n", r"lacks the column\(s\) output_tokens"),
        (
            "arrival_s,arrived_at,num_prefill_tokens,num_decode_tokens\n0,0,1,1\n",
            "formats vidur, arrivals; give format",
        ),
        ("# a remark\n" + PLAIN + "0,1,1\n", "no known trace begins with '# a remark'"),
        (PLAIN + "soon,1,1\n", "line 2: arrival_s is 'soon', must be a time, a number from 0"),
        (PLAIN + f"0,1,{'1' * 200_000}\n", "line 2: field larger than field limit"),
        (
            AZURE + "2023-11-16 18:17,1,1\nyesterday,1,1\n",
            "line 3: TIMESTAMP is 'yesterday', must be an ISO time, as in 2023",
        ),
        (AZURE + "11/16/2023 6:15:46 PM,1,1\n", "line 2: TIMESTAMP is '11/16/2023 6:15:46 PM', must be an ISO time"),
        (AZURE + "15:46.7,1,1\n", "line 2: TIMESTAMP is '15:46.7', must be an ISO time"),
        (
            PLAIN + "0,1,1\n5,1,1\n4,1,1\n",
            r"line 4: arrival_s is before that of .*, must not decrease; sort=True \(--trace_sort\)",
        ),
        (PLAIN + "-1,1,1\n", "line 2: arrival_s is '-1', must be a time, a number from 0"),
        (PLAIN + "0,1,1\nnan,1,1\n", "line 3: arrival_s is 'nan', must be a time"),
        (PLAIN + "0,1,1\n1,-3,1\n", "line 3: prompt_tokens is '-3', must be a whole number from 0"),
        (PLAIN + "0,1,-1\n", "line 2: output_tokens is '-1', must be a whole number from 0"),
        (mooncake([0, 5]) + '\n{"timestamp": 7, "inpu', "line 3: is not JSON: Unterminated string"),
        (f"[{mooncake([0])}]", "line 1: must be a JSON object with timestamp"),
        (line(timestamp=True), "line 1: timestamp is True, must be a time"),
        (line(timestamp=float("nan")), "line 1: timestamp is nan, must be a time"),
        (line(timestamp=-5), "line 1: timestamp is -5, must be a time"),
        (line(timestamp=10**400), "line 1: timestamp is 1000.*, must be a time"),
        (line(input_length=True), "line 1: input_length is True, must be a whole number"),
        (line(input_length=10**20), "line 1: input_length is 100000000000000000000, must be a whole number"),
        (line(input_length=[1]), r"line 1: input_length is \[1\], must be a whole number"),
        (line() + "\n" + turn(1, delay=9), "line 2: has a delay but no timestamp, and session_id is 1, must be that"),
        (line() + "\n" + turn(None, delay=9), "line 2: has a delay .* session_id is None, must be that"),
        (turn([1], timestamp=0) + "\n" + turn([1], delay=9), r"line 2: .* session_id is \[1\], must be that"),
        (turn(1, timestamp=0) + "\n" + turn(1, delay=-9), "line 2: delay is -9, must be a time"),
        (turn(1, timestamp=0) + "\n" + turn(1, delay=10**400), "line 2: delay is 1000.*, must be a time"),
        (turn(1, timestamp=9) + "\n" + turn(2, timestamp=3), "line 2: timestamp is before .*--trace_sort"),
        ('{"timestamp": 0}\n', "line 1: must be a JSON object with timestamp, input_length, output_length"),
        ('{"timestamp": 0,\n', "line 1: is not JSON: Expecting property name"),
        (
            '{"timestamp": 0, "input_length": 1.5, "output_length": 1}',
            "line 1: input_length is 1.5, must be a whole number",
        ),
        ('{"timestamp": null, "input_length": 1, "output_length": 1}', "line 1: timestamp is None, must be a time"),
    ],
)
def test_bad_files_give_one_clear_error(written, text, message):
    path = written(text)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_a_turn_with_a_delay_arrives_that_long_after_the_turn_before_it(written):
    """The time of the answer between them is in no file; a timestamp beside a delay counts alone."""
    turns = [
        turn("a", 1, timestamp=0),
        turn("a", 2, delay=100),
        turn("a", 4, delay=2000.5, timestamp=None),
        turn("b", 3, timestamp=1000),
        turn("b", 5, timestamp=4000, delay=7),
        turn("b", 6, delay=0),
    ]
    trace = read_trace(written("\n".join(turns)))
    assert_holds(trace, [0.0, 0.1, 1.0, 2.1005, 4.0, 4.0], [1, 2, 3, 4, 5, 6], 1)
    assert trace.num_delayed == 3


def test_rows_out_of_order_are_refused_or_sorted(written):
    path = written(mooncake([3000, 0, 1000]))
    with pytest.raises(InputError, match=r"line 2: timestamp is before .*--trace_sort"):
        read_trace(path)
    assert_holds(read_trace(path, sort=True), [0.0, 1.0, 3.0], [1, 2, 0], 1)
    azure = written(AZURE + "2023-11-16 18:00:01,1,1\n2023-11-16 18:00:00,2,2\n2023-11-16 18:00:03,3,3\n")
    assert_holds(read_trace(azure, sort=True), [0.0, 1.0, 3.0], [2, 1, 3], [2, 1, 3])


LAYOUTS = {
    "quoted": '"arrival_s","prompt_tokens","output_tokens"\n"0.5","3","4"\n"2","5","6"\n',
    "tabs": (PLAIN + "0.5,3,4\n2,5,6\n").replace(",", "\t"),
    "semicolons": (PLAIN + "0.5,3,4\n2,5,6\n").replace(",", ";"),
    "spaces": (PLAIN + "0.5,3,4\n2,5,6\n").replace(",", " , "),
    "blank lines": "\n\n" + PLAIN + "\n0.5,3,4\n\n2,5,6\n \n\n",
    "index of pandas": f",{PLAIN}0,0.5,3,4\n1,2,5,6\n",
    "CR LF": (PLAIN + "0.5,3,4\n2,5,6").replace("\n", "\r\n"),
    "CR": (PLAIN + "0.5,3,4\n2,5,6\n").replace("\n", "\r"),
    "byte order mark": "\ufeff" + PLAIN + "0.5,3,4\n2,5,6\n",
    "floats": PLAIN + "0.5,3.0,4.\n2e0,5.00,6\n",
    "empty cells beyond the last column": PLAIN + "0.5,3,4,\n2,5,6,,\n",
    "texts": 'text,arrival_s,prompt_tokens,output_tokens\n"a\nb, ""c""\u2028",0.5,3,4\nd\x0b\x1c\x85\u2028d,2,5,6\n',
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_csv_of_any_layout_is_read(tmp_path, layout, packed):
    content = LAYOUTS[layout].encode()
    (tmp_path / "trace").write_bytes(gzip.compress(content) if packed else content)
    assert_holds(read_trace(tmp_path / "trace"), [0.5, 2.0], [3, 5], [4, 6])


def test_json_lines_end_at_line_feeds_only(written):
    record = {"input_length": 1, "output_length": 2, "text": "a\u2028\x85b"}
    lines = [json.dumps(record | {"timestamp": t}, ensure_ascii=False) for t in (0, 5.5)]
    assert_holds(read_trace(written("\n\n" + "\r\n".join(lines))), [0.0, 0.0055], 1, 2)


def test_time_zones_are_read_and_times_without_are_utc(written):
    stamps = (
        "2024-05-10 00:00:00", "2024-05-10 00:00:01 UTC", "2024-05-10 00:00:02.5 +0000", "2024-05-10T02:00:03Z",
        "2024-05-10T03:00:04+01:00",
    )  # fmt: skip
    trace = read_trace(written(AZURE + "".join(f"{stamp},1,1\n" for stamp in stamps)))
    assert_holds(trace, [0.0, 1.0, 2.5, 7203.0, 7204.0], 1, 1)


def test_an_empty_number_of_response_tokens_is_a_failure_too(written):
    trace = read_trace(written(BURSTGPT + "5,ChatGPT,472,,472,API log\n6,GPT-4,3,4,7,API log\n"))
    assert_holds(trace, [6.0], [3], [4])
    assert trace.num_skipped == 1


def test_arrivals_alone_have_no_lengths(written):
    trace = read_trace(written("id,arrival_s\n1,0.0\n2,0.5\n3,2.0\n"))
    np.testing.assert_array_equal(trace.arrival_s, [0.0, 0.5, 2.0])
    assert (trace.prompt_tokens, trace.output_tokens) == (None, None)
    assert trace.halves()[0].looped(3).output_tokens is None
    assert played(with_gaps(trace, random_start=False), 2).gaps_s == pytest.approx([0.5, 1.5])
    with pytest.raises(InputError, match="has arrivals only"):
        trace.clipped(5, 5)


def test_microseconds_of_inference_sim(written):
    path = written("request_id,arrival_time_us,input_tokens,output_tokens\n0,0,10,5\n1,1500,11,6\n")
    assert_holds(read_trace(path), [0.0, 0.0015], [10, 11], [5, 6])


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)
    (tmp_path / "latin.csv").write_bytes(PLAIN.encode() + b"\xff\xfe")
    with pytest.raises(InputError, match=r"latin.csv, line 2: is not UTF-8 text"):
        read_trace(tmp_path / "latin.csv")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "wide.csv").write_bytes((PLAIN + "0,1,1\n").encode(encoding))
        with pytest.raises(InputError, match=r"wide.csv: is not UTF-8 text but UTF-16"):
            read_trace(tmp_path / "wide.csv")


def test_packed_files_that_are_cut_or_fill_the_memory_are_refused(tmp_path):
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((PLAIN + "0,1,1\n").encode())[:-9])
    with pytest.raises(InputError, match=r"cut.csv.gz: is not a whole gzip file"):
        read_trace(tmp_path / "cut.csv.gz")
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2**26 + 1)))
    with pytest.raises(InputError, match=r"bomb.gz: \d+ bytes unpack to more than 67108864"):
        read_trace(tmp_path / "bomb.gz")


def test_a_format_that_does_not_fit_is_refused(written):
    path = written(PLAIN + "0,1,1\n")
    with pytest.raises(InputError, match=r"format must be one of azure, .*, arrivals, got 'parquet'"):
        read_trace(path, "parquet")
    with pytest.raises(InputError, match="lacks the column"):
        read_trace(path, "azure")
    with pytest.raises(InputError, match="line 1: is not JSON"):
        read_trace(path, "mooncake")


def test_fields_of_different_length_are_refused():
    with pytest.raises(InputError, match="must be vectors of one length"):
        ArrivalTrace(np.zeros(2), np.ones(3), np.ones(2), "a test")


def test_scaling_sets_the_rate_and_keeps_the_shape():
    trace = trace_of([1.0, 2.0, 5.0])
    scaled = trace.scaled_to(4.0)
    assert (trace.rate_per_s, scaled.rate_per_s) == pytest.approx((0.5, 4.0))
    assert scaled.gap_cv == pytest.approx(trace.gap_cv) == pytest.approx(0.5)


def test_cut_and_halves_split_by_time():
    trace = trace_of([0.0, 1.0, 2.0, 9.0, 10.0])
    np.testing.assert_array_equal(trace.cut(1.0, 9.0).arrival_s, [0.0, 1.0])
    first, second = trace.halves()
    np.testing.assert_array_equal(first.arrival_s, [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(second.arrival_s, [4.0, 5.0])
    with pytest.raises(InputError, match=r"no request arrives in \[3.0, 8.0\) s"):
        trace.cut(3.0, 8.0)


def test_looping_keeps_the_rate_and_may_shorten():
    trace = trace_of([1.0, 2.0, 5.0])
    np.testing.assert_array_equal(trace.looped(2).arrival_s, [1.0, 2.0])
    looped = trace.looped(7)
    np.testing.assert_array_equal(looped.arrival_s, [1.0, 2.0, 5.0, 7.0, 8.0, 11.0, 13.0])
    assert looped.rate_per_s == pytest.approx(trace.rate_per_s)


def test_clipping_says_how_many_requests_it_changed():
    trace = ArrivalTrace(np.arange(4), np.array([10, 90, 10, 90]), np.array([5, 5, 50, 50]), "a test")
    clipped, changed = trace.clipped(80, 40)
    assert_holds(clipped, np.arange(4), [10, 80, 10, 80], [5, 5, 40, 40])
    assert changed == 3


def test_dispersion_tells_bursts_from_a_metronome():
    even = trace_of(np.arange(0.0, 100.0, 0.5))
    assert even.index_of_dispersion(10.0) == 0.0
    bursts = trace_of(np.repeat(np.arange(0.0, 100.0), np.tile([1, 9], 50)))
    assert bursts.index_of_dispersion(1.0) == pytest.approx(16.0 / 5.0, rel=0.05)
    with pytest.raises(InputError, match="window_s must lie in"):
        even.index_of_dispersion(60.0)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda trace: trace.scaled_to(0.0), "rate_per_s must be positive"),
        (lambda trace: trace.looped(0), "num_requests must be at least 1"),
        (lambda trace: trace.clipped(0, 5), "max_prompt_tokens must be at least 1, got 0"),
        (lambda trace: trace_of([2.0, 2.0]).rate_per_s, "2 requests at one instant have no rate"),
        (lambda trace: with_gaps(trace, 0.0), "rate_per_s must lie in"),
        (lambda trace: with_gaps(trace_of([1.0])), "1 requests at one instant have no rate"),
    ],
)
def test_bad_use_is_refused(use, message):
    with pytest.raises(InputError, match=message):
        use(trace_of([0.0, 1.0, 2.0]))


def played(process, num_gaps):
    step = lambda state, key: process.next_gap(key, state)[::-1]  # noqa: E731
    keys = jax.random.split(jax.random.key(1), num_gaps)
    _, gaps_s = jax.lax.scan(step, process.init(jax.random.key(0)), keys)
    return trace_of(np.append(0.0, np.cumsum(np.asarray(gaps_s, np.float64))))


def test_azure_conversations_keep_their_bursts_when_played(data_dir):
    trace = read_trace(data_dir / "traces" / "AzureLLMInferenceTrace_conv_first_half.csv")
    assert len(trace) == 9683
    assert (trace.prompt_tokens[0], trace.output_tokens[-1]) == (374, 69)
    assert trace.rate_per_s == pytest.approx(5.55, abs=0.01)
    assert trace.gap_cv == pytest.approx(1.07, abs=0.01)
    dispersion = trace.index_of_dispersion(60.0)
    assert dispersion == pytest.approx(12.9, abs=0.1)
    replay = played(with_gaps(trace, random_start=False), len(trace) - 1)
    np.testing.assert_allclose(replay.arrival_s, trace.arrival_s, atol=1e-3)
    assert replay.index_of_dispersion(60.0) == pytest.approx(dispersion, rel=0.01)
    faster = played(with_gaps(trace, 20.0), len(trace) - 1)
    assert faster.rate_per_s == pytest.approx(20.0, rel=1e-4)
    assert faster.index_of_dispersion(60.0 * trace.rate_per_s / 20.0) == pytest.approx(dispersion, rel=0.25)


def test_azure_code_is_far_burstier_than_poisson(data_dir):
    trace = read_trace(data_dir / "traces" / "AzureLLMInferenceTrace_code_first_half.csv")
    assert len(trace) == 4409
    assert (trace.rate_per_s, trace.gap_cv) == pytest.approx((3.10, 14.1), abs=0.01)


def test_mooncake_conversations_become_nearly_poisson_once_spread(data_dir):
    trace = read_trace(data_dir / "traces" / "mooncake_conversation_first_3000.jsonl", spread_s=3.0)
    assert (len(trace), trace.prompt_tokens[0], trace.output_tokens[0]) == (3000, 6758, 500)
    assert trace.rate_per_s == pytest.approx(3.03, abs=0.01)
    assert trace.gap_cv == pytest.approx(1.0, abs=0.05)


def test_every_format_is_recognised_from_its_first_line(written):
    for format, columns in COLUMNS.items():
        row = ["2023-11-16 18:15" if format in ("azure", "litellm", "sglang") else "0", "3", "4"][: len(columns)]
        record = dict(zip(columns, row, strict=True))
        text = ",".join(columns) + "\n" + ",".join(row)
        if format == "mooncake":
            text = json.dumps(record)
        if format == "benchmark":
            text = json.dumps({name: [value] for name, value in record.items()})
        if format == "sglang":
            text = "\n".join([sglang("received", "a", row[0]), sglang("finished", "a", row[0], *row[1:])])
        trace = read_trace(written(text))
        assert len(trace) == 1
        assert format == "arrivals" or (trace.prompt_tokens[0], trace.output_tokens[0]) == (3, 4)
