"""group_norm_silu and attention at eight shapes of the networks, forward and backward, by replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu.cases import Case, Values, measure
from benchmarks.gpu.target import Target
from diffmem.precision import float32_products, matmul_precision

STEPS = ("inference", "training")
LAYOUTS = (torch.channels_last, torch.contiguous_format)


def run(target: Target) -> list[str]:
    wrong = []
    for cases in (group_norm_cases, attention_cases):
        for case in cases(target):
            wrong += measure(case, target, "operations")
            target.empty_cache()
    return wrong


def dtypes(target: Target) -> tuple[torch.dtype, ...]:
    # The interpreter's bfloat16 products are wrong.
    return (torch.float32, torch.float16) if target.tiny else (torch.bfloat16, torch.float32)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_gradients(
    function: Callable[..., torch.Tensor], inputs: list[list[torch.Tensor]], dy: torch.Tensor | None
) -> Callable[[int], Values]:
    """Computes function(*inputs[number]), and with `dy` the gradients of all inputs."""

    def run(number: int) -> Values:
        if dy is None:
            with torch.no_grad():
                return [function(*inputs[number])]
        leaves = [each.detach().requires_grad_() for each in inputs[number]]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    return run


def group_norm_cases(target: Target) -> Iterator[Case]:
    """Both forms of the networks: an embedding added before it, a scale and shift after it."""
    from diffmem.ops.group_norm_silu import group_norm_silu

    if target.tiny:
        shapes = [((1, 8, 4, 4), "added"), ((1, 8, 4, 4), "adaptive"), ((1, 32, 17, 16), "added")]
    else:
        shapes = [
            ((512, 256, 32, 32), "added"), ((512, 256, 16, 16), "added"), ((512, 256, 8, 8), "added"),
            ((64, 192, 64, 64), "adaptive"), ((64, 768, 8, 8), "adaptive"),
        ]  # fmt: skip
    layouts = LAYOUTS if target.tiny else LAYOUTS[:1]
    for (shape, form), dtype, layout, step in target.combinations(shapes, dtypes(target), layouts, STEPS):
        name = f"group_norm_silu {'x'.join(map(str, shape))} {name_of(dtype)} {form} {step}"
        if not target.fits(4.0, name):
            continue
        groups = 1 if target.tiny else min(32, shape[1] // 4)
        count = shape[0] * shape[1] * shape[2] * shape[3]
        sets = target.sets(count * dtype.itemsize)

        def inputs_of(seed: int, shape=shape, dtype=dtype, layout=layout, form=form) -> list[torch.Tensor]:
            x = target.normal(*shape, dtype=dtype, seed=seed).to(memory_format=layout)
            rows = [target.normal(*shape[:2], seed=seed + 100 + each) for each in range(2 if form == "adaptive" else 1)]
            return [x, target.normal(shape[1], seed=1), target.normal(shape[1], seed=2), *rows]

        inputs = [inputs_of(number) for number in range(sets)]
        dy = target.normal(*shape, dtype=dtype, seed=5).to(memory_format=layout) if step == "training" else None

        def function(x, weight, bias, *rows, groups=groups, impl, op=group_norm_silu):
            scale, shift, added = (*rows, None) if len(rows) == 2 else (None, None, *rows)
            return op(x, groups, weight, bias, 1e-6, scale, shift, True, added, impl)

        # What PyTorch would be given: parameters of the map's dtype.
        same = [[each.to(dtype) for each in given] for given in inputs]
        ways = {
            "triton": with_gradients(partial(function, impl="triton"), inputs, dy),
            "PyTorch eager": with_gradients(partial(function, impl="torch"), same, dy),
        }
        # Generated code takes seconds each: where the question is decided, in the dtype that is used.
        if dtype == dtypes(target)[0] and (step == "inference" or shape == shapes[0][0]):
            compiled = target.compile(group_norm_silu)
            ways["torch.compile"] = with_gradients(partial(function, impl="torch", op=compiled), same, dy)
        exact = [[each.double() for each in inputs[0]]]
        yield Case(
            name,
            ways,
            partial(with_gradients(partial(function, impl="reference"), exact, None if dy is None else dy.double()), 0),
            "PyTorch eager",
            ("triton",),
            sets=sets,
            bytes=(2 if dy is None else 5) * count * dtype.itemsize,  # each map read and written once
        )


def attention_cases(target: Target) -> Iterator[Case]:
    """In float32 with IEEE and with TF32 products."""
    from diffmem.ops.attention import attention

    # Images, heads, channels per head, side of the map.
    shapes = [(1, 1, 24, 4), (1, 2, 16, 5)] if target.tiny else [(512, 1, 256, 16), (64, 6, 64, 32), (64, 12, 64, 8)]
    numbers = [
        (dtype, precision)
        for dtype in dtypes(target)
        for precision in ("ieee", "tf32")
        if precision == "ieee" or dtype == torch.float32
    ]  # in a dry run TF32 is its tiles, in float32
    layouts = LAYOUTS if target.tiny else LAYOUTS[:1]
    for shape, (dtype, precision), layout, step in target.combinations(shapes, numbers, layouts, STEPS):
        batch, heads, channels, side = shape
        with float32_products(precision):
            assert dtype != torch.float32 or matmul_precision() == precision
            name = f"attention {batch}x{heads}x{channels} {side}x{side} {name_of(dtype)} {precision} {step}"
            if not target.fits(3.0, name):
                continue
            count = batch * heads * channels * side * side
            sets = target.sets(4 * count * dtype.itemsize)
            inputs = [
                [
                    target.normal(batch, 3 * heads * channels, side, side, dtype=dtype, seed=seed).to(
                        memory_format=layout
                    )
                ]
                for seed in range(sets)
            ]
            dy = target.normal(batch, heads * channels, side, side, dtype=dtype, seed=99)
            dy = dy.to(memory_format=layout) if step == "training" else None

            def of(impl: str, inputs=inputs, dy=dy, heads=heads, op=attention):
                return with_gradients(lambda qkv: op(qkv, heads, impl), inputs, dy)

            exact = of("reference", [[inputs[0][0].double()]], None if dy is None else dy.double())
            yield Case(
                name,
                {"triton": of("triton"), "SDPA": of("torch")},
                partial(exact, 0),
                "SDPA",
                ("triton",),
                sets=sets,
                bytes=(4 if dy is None else 12) * count * dtype.itemsize,
                operations=(2 if dy is None else 7) * 2.0 * count * side * side,
                matrix=f"{name_of(dtype)} {precision}" if dtype == torch.float32 else name_of(dtype),
            )
