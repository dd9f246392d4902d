"""Figures of a program's text: small pieces of optimized HLO, as libtpu's compiler writes it."""

from collections import Counter

import pytest

from domino_jax.runtime.hlo import array_bytes, parse_program, read_figures

PHASES = ("draft", "head", "target")
BIG = "bf16[4096,1024]{1,0:T(8,128)(2,1)}"  # 8 MiB
CACHE = "bf16[1,2,4096,128]{3,2,1,0:T(8,128)(2,1)}"  # 2 MiB


def cost(cycles: int, path: str = "") -> str:
    """What stands behind an operation: where it comes from, and what the compiler thinks that it takes."""
    return (
        f', metadata={{op_name="{path}" stack_frame_id=7}}, backend_config={{"flag_configs":[],"window_config":'
        f'{{"kernel_window_bounds":["4","32"],"estimated_cycles":"{cycles}","iteration_bounds":["1","4","1"]}},'
        '"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"16777216"}]}'
    )


LOOP = f"""HloModule jit_speculate, is_scheduled=true, input_output_alias={{ {{0}}: (0, {{}}, may-alias) }}

%fused.weight (param_0: {BIG}, param_1: bf16[8,1024]) -> bf16[8,4096] {{
  %param_0 = {BIG} parameter(0)
  %param_1 = bf16[8,1024]{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %convolution.1 = bf16[8,4096]{{1,0:T(8,128)(2,1)}} convolution(%param_1, %param_0), dim_labels=bf_oi->bf\
{cost(999, "jit(speculate)/while/body/target/dot_general")}
}}

%fused.sum (param_0.1: f32[8,1024]) -> f32[8,1024] {{
  %param_0.1 = f32[8,1024]{{1,0:T(8,128)}} parameter(0)
  ROOT %all-reduce.7 = f32[8,1024]{{1,0:T(8,128)}} all-reduce(%param_0.1), channel_id=1, to_apply=%add
}}

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[]{{:T(128)}} parameter(0)
  %y = f32[]{{:T(128)}} parameter(1)
  ROOT %sum = f32[]{{:T(128)}} add(%x, %y)
}}

%inner (arg.2: (s32[])) -> (s32[]) {{
  %arg.2 = (s32[]{{:T(128)}}) parameter(0)
  %gte.9 = s32[]{{:T(128)}} get-tuple-element(%arg.2), index=0
  %turn = s32[]{{:T(128)}} add(%gte.9, %gte.9){cost(10, "jit(speculate)/while/body/head/while/body/add")}
  ROOT %tuple.2 = (s32[]{{:T(128)}}) tuple(%turn)
}}

%inner_more (arg.3: (s32[])) -> pred[] {{
  %arg.3 = (s32[]{{:T(128)}}) parameter(0)
  ROOT %true = pred[]{{:T(512)}} constant(true)
}}

%cheap (arg.4: (s32[])) -> s32[] {{
  %arg.4 = (s32[]{{:T(128)}}) parameter(0)
  ROOT %got = s32[]{{:T(128)}} get-tuple-element(%arg.4), index=0{cost(5, "jit(speculate)/while/body/draft/cond")}
}}

%dear (arg.5: (s32[])) -> s32[] {{
  %arg.5 = (s32[]{{:T(128)}}) parameter(0)
  ROOT %got.2 = s32[]{{:T(128)}} get-tuple-element(%arg.5), index=0{cost(70, "jit(speculate)/while/body/draft/cond")}
}}

%body (arg: (s32[], {BIG}, bf16[8,1024])) -> (s32[], {BIG}, bf16[8,1024]) {{
  %arg = (s32[]{{:T(128)}}, {BIG}, /*index=2*/bf16[8,1024]{{1,0}}) parameter(0)
  %number = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %weight = {BIG} get-tuple-element(%arg), index=1
  %x = bf16[8,1024]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%arg), index=2
  %fusion.1 = bf16[8,4096]{{1,0:T(8,128)(2,1)S(1)}} fusion(%weight, %x), kind=kOutput, calls=%fused.weight{cost(4000)}
  %fusion.2 = f32[8,1024]{{1,0:T(8,128)S(1)}} fusion(%x), kind=kCustom, calls=%fused.sum{cost(30, "a/target/psum")}
  %gathered = (bf16[2,128]{{1,0}}, bf16[8,128]{{1,0}}) all-gather-start(%x), dimensions={{0}}
  %gathered.2 = bf16[8,128]{{1,0}} all-gather-done(%gathered)
  %start = (s32[]{{:T(128)}}) tuple(%number)
  %while.2 = (s32[]{{:T(128)}}) while(%start), condition=%inner_more, body=%inner, \
backend_config={{"known_trip_count":{{"n":"4"}}}}
  %which = s32[] conditional(%number, %start, %start), branch_computations={{%cheap, %dear}}
  %kernel = bf16[8,1024]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call"
  %more = s32[]{{:T(128)}} add(%number, %number){cost(3, "jit(speculate)/while/body/add")}
  ROOT %tuple = (s32[]{{:T(128)}}, {BIG}, bf16[8,1024]{{1,0}}) tuple(%more, %weight, %x)
}}

%more_cycles (arg.1: (s32[], {BIG}, bf16[8,1024])) -> pred[] {{
  %arg.1 = (s32[]{{:T(128)}}, {BIG}, bf16[8,1024]{{1,0}}) parameter(0)
  ROOT %less = pred[]{{:T(512)}} constant(true){cost(1)}
}}

ENTRY %main.9_spmd (params.1: {BIG}, x.1: bf16[8,1024]) -> (s32[], {BIG}, bf16[8,1024]) {{
  %params.1 = {BIG} parameter(0), sharding={{replicated}}, metadata={{op_name="params.target.layers[0].q"}}
  %x.1 = bf16[8,1024]{{1,0:T(8,128)(2,1)}} parameter(1), metadata={{op_name="x"}}
  %zero = s32[]{{:T(128)}} constant(0)
  %before = s32[]{{:T(128)}} add(%zero, %zero){cost(200, "jit(speculate)/add")}
  %init = (s32[]{{:T(128)}}, {BIG}, bf16[8,1024]{{1,0}}) tuple(%before, %params.1, %x.1)
  ROOT %while.1 = (s32[]{{:T(128)}}, {BIG}, bf16[8,1024]{{1,0}}) while(%init), condition=%more_cycles, body=%body
}}
"""


def test_the_loops_body_counts_once_and_inner_loops_by_their_turns():
    loop, around, moves = read_figures(LOOP, PHASES)
    # 4000 by what is fused in it, 30; 4 turns of 10; the dearer branch; what is in no phase.
    assert loop.cycles == Counter(target=4030, head=40, draft=70, other=4)
    assert around.cycles == Counter(other=200)
    assert loop.unknown == 1, "of a kernel nothing is estimated"
    assert not moves


@pytest.mark.parametrize(
    ("end", "turns"),
    [
        ("compare(%gte, %end), direction=LT", 8),
        ("compare(%gte, %gte), direction=LT", 1),
        ("compare(%gte, %end), direction=NE", 1),
        ("and(%gte, %end)", 1),
    ],
)
def test_a_loop_that_does_not_say_its_turns_runs_as_its_counter_ends(end, turns):
    """As the loop over rows that a scatter becomes."""
    counter = f"""  %gte = s32[]{{:T(128)}} get-tuple-element(%arg.3), index=0
  %end = s32[]{{:T(128)}} constant(8)
  ROOT %less.1 = pred[]{{:T(512)}} {end}
"""
    text = LOOP.replace("  ROOT %true = pred[]{:T(512)} constant(true)\n", counter)
    text = text.replace('backend_config={"known_trip_count":{"n":"4"}}', "backend_config={}")
    assert counter in text and read_figures(text, PHASES).loop.cycles["head"] == 10 * turns


def test_collectives_are_counted_by_kind_with_the_bytes_that_come_out():
    loop, around, _ = read_figures(LOOP, PHASES)
    assert loop.collectives == {"all-reduce": 1, "all-gather": 1} and not around.collectives
    assert loop.collective_bytes == {"all-reduce": 8 * 1024 * 4, "all-gather": 8 * 128 * 2}


def test_an_estimate_of_the_largest_number_is_none():
    """As of the products of each expert's rows by its own matrix."""
    plain = read_figures(LOOP, PHASES).loop
    kernel = 'custom_call_target="tpu_custom_call"'
    assert read_figures(LOOP.replace(kernel, kernel + cost(2**63 - 1)), PHASES).loop == plain
    text = LOOP.replace(cost(30, "a/target/psum"), cost(2**63 - 1, "a/target/psum"))
    assert read_figures(text, PHASES).loop == plain._replace(cycles=plain.cycles - Counter(target=30), unknown=2)


def test_a_program_without_a_loop_is_read_whole():
    text = LOOP.replace(
        "while(%init), condition=%more_cycles, body=%body\n", f"custom-call(%init){cost(50, 'a/target/b')}\n"
    )
    loop, around, _ = read_figures(text, PHASES)
    assert (loop.cycles, around.cycles) == (Counter(other=200, target=50), Counter())


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [2048]),
        ("(f32[2]{0}, (s8[3,5]{1,0}, pred[7]{0}), u32[]{:S(2)})", [8, 15, 7, 4]),
        ("f8e4m3fn[16]{0}", [16]),
        ("s4[16]{0:T(128)}", [8]),
        ("token[]", [0]),
    ],
)
def test_bytes_of_results(shapes, sizes):
    assert array_bytes(shapes) == sizes


def test_parts_of_an_operation():
    program = parse_program(LOOP)
    assert program.entry == "main.9_spmd" and len(program.computations["body"]) == 14
    fusion = next(x for x in program.computations["body"] if x.name == "fusion.1")
    assert (fusion.opcode, fusion.operands, fusion.called("calls")) == ("fusion", ("weight", "x"), ("fused.weight",))
    assert (fusion.cycles, fusion.origin) == (4000, "")
    which = next(x for x in program.computations["body"] if x.opcode == "conditional")
    assert which.called("branch_computations") == ("cheap", "dear") and which.cycles is None


def moves(*lines: str, around: str = "") -> list[tuple[str, str, bool]]:
    """The copies that lines in the loop's body, or around it, make of a weight %w and a cache %c."""
    text = f"""HloModule jit_f

%moving (p.0: {BIG}) -> {BIG} {{
  %p.0 = {BIG} parameter(0)
  %turned = bf16[1024,4096]{{0,1:T(8,128)(2,1)}} transpose(%p.0), dimensions={{1,0}}
  ROOT %as = bf16[4096,1024]{{0,1:T(8,128)(2,1)}} bitcast(%turned)
}}

%floats (p.1: {BIG}) -> f32[4096,1024] {{
  %p.1 = {BIG} parameter(0)
  ROOT %wide = f32[4096,1024]{{1,0:T(8,128)}} convert(%p.1)
}}

%computing (p.2: {BIG}) -> {BIG} {{
  %p.2 = {BIG} parameter(0)
  %turned.1 = bf16[1024,4096]{{0,1:T(8,128)(2,1)}} transpose(%p.2), dimensions={{1,0}}
  ROOT %twice = bf16[4096,1024]{{0,1:T(8,128)(2,1)}} add(%turned.1, %turned.1)
}}

%storing (p.3: {CACHE}, p.4: bf16[1,2,1,128], p.5: s32[]) -> {CACHE} {{
  %p.3 = {CACHE} parameter(0)
  %p.4 = bf16[1,2,1,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(1)
  %p.5 = s32[]{{:T(128)}} parameter(2)
  ROOT %written = {CACHE} dynamic-update-slice(%p.3, %p.4, %p.5, %p.5, %p.5, %p.5)
}}

%body (arg: ({BIG}, {CACHE})) -> ({BIG}, {CACHE}) {{
  %arg = ({BIG}, {CACHE}) parameter(0)
  %w = {BIG} get-tuple-element(%arg), index=0
  %c = {CACHE} get-tuple-element(%arg), index=1
  {chr(10).join(lines).replace(chr(10), chr(10) + "  ")}
  ROOT %out = ({BIG}, {CACHE}) tuple(%w, %c)
}}

%more (arg.1: ({BIG}, {CACHE})) -> pred[] {{
  %arg.1 = ({BIG}, {CACHE}) parameter(0)
  ROOT %true = pred[]{{:T(512)}} constant(true)
}}

ENTRY %main (w: {BIG}, c: {CACHE}) -> ({BIG}, {CACHE}) {{
  %w.1 = {BIG} parameter(0), metadata={{op_name="params.target.layers[0].o"}}
  %c.1 = {CACHE} parameter(1), metadata={{op_name="state.cache.k[0]"}}
  {around}
  %init = ({BIG}, {CACHE}) tuple(%w.1, %c.1)
  ROOT %loop = ({BIG}, {CACHE}) while(%init), condition=%more, body=%body
}}
"""
    return [(move.argument, move.opcode, move.looped) for move in read_figures(text, PHASES).moves]


WEIGHT, CACHED = "params.target.layers[0].o", "state.cache.k[0]"
TURNED = BIG.replace("1,0:", "0,1:")
FAST, NEAR = (kind.replace("(2,1)}", "(2,1)S(1)}") for kind in (BIG, CACHE))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([f"%a = {TURNED} copy(%w)"], (WEIGHT, "copy")),
        ([f"%a = ({TURNED}, {BIG}, u32[]{{:S(2)}}) copy-start(%w)"], (WEIGHT, "copy-start")),
        ([f"%a = {TURNED} fusion(%w), kind=kLoop, calls=%moving"], (WEIGHT, "fusion")),
        (["%a = f32[4096,1024]{1,0} fusion(%w), kind=kLoop, calls=%floats"], (WEIGHT, "fusion")),
        ([f"%b = {BIG} bitcast(%w)", "%a = bf16[8192,1024]{1,0} concatenate(%b, %b)"], (WEIGHT, "concatenate")),
        (["%a = bf16[16384,1024]{1,0} all-gather(%w), dimensions={0}"], (WEIGHT, "all-gather")),
        ([f"%a = {CACHE} copy(%c)"], (CACHED, "copy")),
        (
            [
                "%new = bf16[1,2,1,128]{3,2,1,0} constant(0)",
                f"%b = ({NEAR}, {CACHE}, u32[]{{:S(2)}}) copy-start(%c)",
                f"%d = {NEAR} copy-done(%b)",
                f"%e = {NEAR} dynamic-update-slice(%d, %new, %new, %new, %new, %new)",
                f"%a = ({CACHE}, {NEAR}, u32[]{{:S(2)}}) copy-start(%e)",
            ],
            (CACHED, "write-back"),
        ),
        (
            [
                "%new = bf16[1,2,1,128]{3,2,1,0} constant(0)",
                f"%b = {CACHE} fusion(%c, %new, %new), kind=kLoop, calls=%storing",
                f"%a = {CACHE.replace('3,2,1,0', '2,3,1,0')} transpose(%b)",
            ],
            (CACHED, "transpose"),
        ),
    ],
)
def test_a_copy_of_an_argument_is_found_by_where_its_values_come_from(lines, found):
    assert moves(*lines) == [(*found, True)]
    around = "\n  ".join(lines).replace("%w", "%w.1").replace("%c,", "%c.1,").replace("(%c)", "(%c.1)")
    assert moves(around=around) == [(*found, False)]


@pytest.mark.parametrize(
    "lines",
    [
        [f"%a = ({FAST}, {BIG}, u32[]{{:S(2)}}) copy-start(%w)", f"%b = {FAST} copy-done(%a)"],  # read early
        [f"%a = {FAST} copy(%w)"],
        ["%a = bf16[1,2,64,128]{3,2,1,0} slice(%c), slice={[0:1], [0:2], [0:64], [0:128]}"],  # small
        [f"%a = {TURNED} fusion(%w), kind=kLoop, calls=%computing"],
        ["%z = bf16[4096,1024]{1,0} constant(0)", f"%a = {TURNED} copy(%z)"],  # no argument's
        ["%new = bf16[1,2,1,128]{3,2,1,0} constant(0)", f"%a = {CACHE} fusion(%c, %new, %new), calls=%storing"],
    ],
)
def test_what_is_no_copy_of_an_argument_is_not_found(lines):
    assert moves(*lines) == []
