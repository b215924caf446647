"""A batched product of full rows by TMA: rows of heads times their matrices, with an outer product added (spike)."""
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit(do_not_specialize=["FIRST_ROW", "ROWS_EACH", "E", "FIRST_COLUMN"])
def tma_kernel(
    values, weight, products, p_pairs, p_pair_weight, FIRST_ROW, ROWS_EACH, R, H, FIRST_COLUMN, CHUNK, E,
    D: tl.constexpr, PARTS: tl.constexpr, HAS_PAIRS: tl.constexpr, PAIR: tl.constexpr, K_MAJOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWEEP: tl.constexpr, STAGES: tl.constexpr, EPILOGUE: tl.constexpr,
):
    i_head = tl.program_id(2)
    i_row = tl.program_id(0) * ROWS
    first = FIRST_ROW + i_row
    b_0 = values.load([i_head, first, 0]).reshape(ROWS, D)
    if PARTS == 3:
        b_1 = values.load([i_head, first, D]).reshape(ROWS, D)
        b_2 = values.load([i_head, first, 2 * D]).reshape(ROWS, D)
    if HAS_PAIRS:
        o_row = i_head.to(tl.int64) * R + first + tl.arange(0, ROWS)
        m_row = i_row + tl.arange(0, ROWS) < ROWS_EACH
        b_pair = tl.load(p_pairs + o_row * PAIR, mask=m_row, other=0.0).to(tl.float32)
        b_pair += tl.load(p_pairs + o_row * PAIR + 1, mask=m_row, other=0.0).to(tl.float32)
    begin = tl.program_id(1) * SWEEP * COLUMNS
    for start in tl.range(begin, tl.minimum(CHUNK, begin + SWEEP * COLUMNS), COLUMNS, num_stages=STAGES):
        column = FIRST_COLUMN + start
        if K_MAJOR:
            b_w = weight.load([i_head, column, 0]).reshape(COLUMNS, D).T
        else:
            b_w = weight.load([i_head, 0, column]).reshape(D, COLUMNS)
        b_product = tl.dot(b_0, b_w)
        if PARTS == 3:
            b_w = weight.load([i_head, column, D]).reshape(COLUMNS, D).T
            b_product = tl.dot(b_1, b_w, b_product)
            b_w = weight.load([i_head, column, 2 * D]).reshape(COLUMNS, D).T
            b_product = tl.dot(b_2, b_w, b_product)
        if HAS_PAIRS:
            b_wp = tl.load(p_pair_weight + i_head.to(tl.int64) * H + column + tl.arange(0, COLUMNS)).to(tl.float32)
            b_product += b_pair[:, None] * b_wp[None]
        if EPILOGUE:
            b_l, b_r = tl.split(tl.permute(tl.reshape(b_product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            products.store([i_head, i_row, start], b_l.to(products.dtype).reshape(1, ROWS, COLUMNS // 2))
            products.store([i_head, i_row, start + COLUMNS // 2], b_r.to(products.dtype).reshape(1, ROWS, COLUMNS // 2))
        else:
            products.store([i_head, i_row, start], b_product.to(products.dtype).reshape(1, ROWS, COLUMNS))


def product(values, weight, k_major, parts, size, pairs, first_row, rows_each, first_column, columns, products, cfg):
    """values [E, R, parts*D]; weight [E, h, 3D] if k_major else [E, D, h]; products [E, rows_each, columns]."""
    E, R, _ = values.shape
    h = weight.shape[1] if k_major else weight.shape[2]
    rows, cols = cfg["ROWS"], cfg["COLUMNS"]
    a = TensorDescriptor.from_tensor(values, [1, rows, size])
    w = TensorDescriptor.from_tensor(weight, [1, cols, size] if k_major else [1, size, cols])
    o = TensorDescriptor.from_tensor(products, [1, rows, cols // 2 if cfg["EPILOGUE"] else cols])
    grid = (triton.cdiv(rows_each, rows), triton.cdiv(columns, cols * cfg["SWEEP"]), E)
    p, pw = pairs or (None, None)
    return tma_kernel[grid](a, w, o, p, pw, first_row, rows_each, R, h, first_column, columns, E, D=size, PARTS=parts,
                     HAS_PAIRS=pairs is not None, PAIR=16, K_MAJOR=k_major, **cfg)


@triton.jit(do_not_specialize=["FIRST_ROW", "ROWS_EACH", "FIRST_COLUMN", "TILES", "COLUMN_TILES", "ROW_TILES"])
def gemm_kernel(
    values, weight, products, p_pairs, p_pair_weight, FIRST_ROW, ROWS_EACH, R, H, FIRST_COLUMN, CHUNK, TILES, COLUMN_TILES, ROW_TILES,
    KTILES: tl.constexpr, K_MAJOR: tl.constexpr, HAS_PAIRS: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FLATTEN: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), flatten=FLATTEN):
        i_column = tile % COLUMN_TILES * COLUMNS
        i_rest = tile // COLUMN_TILES
        i_row = i_rest % ROW_TILES * ROWS
        i_head = i_rest // ROW_TILES
        b_product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, KTILES, num_stages=STAGES):
            b_a = values.load([i_head, FIRST_ROW + i_row, k * INNER]).reshape(ROWS, INNER)
            if K_MAJOR:
                b_w = weight.load([i_head, FIRST_COLUMN + i_column, k * INNER]).reshape(COLUMNS, INNER).T
            else:
                b_w = weight.load([i_head, k * INNER, FIRST_COLUMN + i_column]).reshape(INNER, COLUMNS)
            b_product = tl.dot(b_a, b_w, b_product)
        if HAS_PAIRS:
            o_row = i_head.to(tl.int64) * R + FIRST_ROW + i_row + tl.arange(0, ROWS)
            m_row = i_row + tl.arange(0, ROWS) < ROWS_EACH
            b_pair = tl.load(p_pairs + o_row * PAIR, mask=m_row, other=0.0).to(tl.float32)
            b_pair += tl.load(p_pairs + o_row * PAIR + 1, mask=m_row, other=0.0).to(tl.float32)
            b_wp = tl.load(p_pair_weight + i_head.to(tl.int64) * H + FIRST_COLUMN + i_column + tl.arange(0, COLUMNS)).to(tl.float32)
            b_product += b_pair[:, None] * b_wp[None]
        if SPLIT:
            b_l, b_r = tl.split(tl.permute(tl.reshape(b_product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            products.store([i_head, i_row, i_column], b_l.to(products.dtype).reshape(1, ROWS, COLUMNS // 2))
            products.store([i_head, i_row, i_column + COLUMNS // 2], b_r.to(products.dtype).reshape(1, ROWS, COLUMNS // 2))
        else:
            products.store([i_head, i_row, i_column], b_product.to(products.dtype).reshape(1, ROWS, COLUMNS))


def gemm(values, weight, k_major, pairs, first_row, rows_each, first_column, columns, products, cfg, programs=None):
    cfg = dict(cfg)
    programs = cfg.pop("programs", None)
    E, R, inner = values.shape
    h = weight.shape[1] if k_major else weight.shape[2]
    rows, cols, k = cfg["ROWS"], cfg["COLUMNS"], cfg["INNER"]
    a = TensorDescriptor.from_tensor(values, [1, rows, k])
    w = TensorDescriptor.from_tensor(weight, [1, cols, k] if k_major else [1, k, cols])
    o = TensorDescriptor.from_tensor(products, [1, rows, cols // 2 if cfg["SPLIT"] else cols])
    row_tiles, column_tiles = triton.cdiv(rows_each, rows), triton.cdiv(columns, cols)
    tiles = row_tiles * column_tiles * E
    p, pw = pairs or (None, None)
    return gemm_kernel[(min(tiles, programs or tiles),)](a, w, o, p, pw, first_row, rows_each, R, h, first_column, columns, tiles, column_tiles, row_tiles,
                     KTILES=inner // k, HAS_PAIRS=pairs is not None, PAIR=16, K_MAJOR=k_major, **cfg)
