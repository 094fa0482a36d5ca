"""Families of clean rows whose answers are computed: problems, tables, dates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, timedelta
from random import Random

from tests.data.doctor.families import Pair

NAMES = "小红 小刚 小美 爷爷 李叔叔 果园主人 班长 店主 妈妈 图书管理员 快递员 教练".split()
THINGS = "苹果 铅笔 邮票 气球 鸡蛋 贝壳 信封 橘子 纽扣 书签 饼干 灯笼".split()
GOODS = "台灯 雨伞 水壶 围巾 闹钟 背包 餐盘 地毯 镜子 剪刀 枕头 花瓶 书架 毛巾".split()
THINGS_EN = "stamps shells marbles pears candles buttons postcards tickets bricks eggs".split()
NAMES_EN = "Nora Ivan Lucia Kofi Mei Oscar Hana Pablo Greta Sami".split()


def shared(rng: Random) -> Pair:
    n, each, rest = rng.randint(3, 12), rng.randint(4, 19), rng.randint(1, 2)
    who, what = rng.choice(NAMES), rng.choice(THINGS)
    return (
        f"{who}把一些{what}分给{n}个孩子，每人{each}个，还剩{rest}个，原来有多少个{what}？",
        f"分出去的有{n}×{each}={n * each}个，加上剩下的{rest}个，原来有{n * each + rest}个。",
    )


def journey(rng: Random) -> Pair:
    speed, hours = rng.randint(41, 95), rng.randint(2, 9)
    start = rng.choice(["一辆货车从甲地开往乙地", "轮船顺流而下", "摩托车队去邻县", "列车驶出车站"])
    return (
        f"{start}，平均每小时{speed}千米，{hours}小时到达，路程是多少？",
        f"路程 = 速度 × 时间 = {speed} × {hours} = {speed * hours}（千米）",
    )


def rectangle(rng: Random) -> Pair:
    a, b = rng.randint(5, 60), rng.randint(5, 60)
    what = rng.choice(["菜地", "操场", "玻璃", "游泳池底", "壁画", "桌布"])
    return (
        f"长方形{what}的长是{a}米，宽是{b}米，求面积和周长。",
        f"解：面积S={a}×{b}={a * b}（平方米）；周长C=2×({a}+{b})={2 * (a + b)}（米）。",
    )


def discount(rng: Random) -> Pair:
    price, off = rng.randint(12, 180) * 10, rng.choice([6, 7, 8, 9])
    what = rng.choice(GOODS)
    return (
        f"商场里{what}的标价是￥{price}，打{off}折出售，便宜了多少钱？",
        f"现价：{price}×0.{off}={price * off // 10}元\n便宜：{price}-{price * off // 10}"
        f"={price - price * off // 10}元",
    )


def equation(rng: Random) -> Pair:
    a, x, b = rng.randint(2, 15), rng.randint(2, 40), rng.randint(3, 90)
    word = rng.choice(["解方程", "求x的值", "已知下式成立，x等于几"])
    return (
        f"{word}：{a}x + {b} = {a * x + b}",
        f"移项得{a}x = {a * x + b} - {b} = {a * x}，两边同除以{a}，得x = {x}。",
    )


def weekday(rng: Random) -> Pair:
    day = date(2022, 1, 1) + timedelta(days=rng.randrange(1400))
    later = rng.randint(8, 90)
    end = day + timedelta(days=later)
    week = "一二三四五六日"
    return (
        f"{day.year}年{day.month}月{day.day}日是星期{week[day.weekday()]}，再过{later}天是星期几？",
        f"{later}÷7={later // 7}（周）……{later % 7}（天），那天是{end.month}月{end.day}日，"
        f"星期{week[end.weekday()]}。",
    )


def mean(rng: Random) -> Pair:
    scores = [rng.randint(60, 99) for _ in range(5)]
    scores[-1] += -sum(scores) % 5
    subject = rng.choice(["语文", "跳绳", "投篮", "听写", "科学", "背诵"])
    return (
        f"五次{subject}成绩分别是{'、'.join(map(str, scores))}，平均数是多少？",
        f"({'+'.join(map(str, scores))})÷5={sum(scores)}÷5={sum(scores) // 5}",
    )


def together(rng: Random) -> Pair:
    who, other = rng.sample(NAMES, 2)
    a, more, what = rng.randint(15, 80), rng.randint(3, 14), rng.choice(THINGS)
    return (
        f"{who}收集了{a}枚{what}，比{other}少{more}枚，两人一共有几枚？",
        f"{other}有{a + more}枚，合计{a}+{a + more}={2 * a + more}枚。",
    )


ZH: tuple[Callable[[Random], Pair], ...] = (
    shared, journey, rectangle, discount, equation, weekday, mean, together,
)  # fmt: skip


def sums_zh(rng: Random) -> Iterator[Pair]:
    """Problems of the primary school, solved."""
    while True:
        yield rng.choice(ZH)(rng)


def sums_en(rng: Random) -> Iterator[Pair]:
    """Word problems in English, with their steps."""
    while True:
        a, b, c = rng.randint(12, 60), rng.randint(3, 11), rng.randint(2, 9)
        name, thing = rng.choice(NAMES_EN), rng.choice(THINGS_EN)
        yield rng.choice(
            [
                (
                    f"{name} packs {a * b} {thing} into boxes of {b}. How many boxes are needed?",
                    f"{a * b} ÷ {b} = {a} boxes.",
                ),
                (
                    f"If {name} sells {a} {thing} at ${c}.50 each, what is the income?",
                    f"{a} × ${c}.50 = ${a * (2 * c + 1) / 2:.2f}",
                ),
                (
                    f"A shelf holds {a} {thing}; {name} takes {b} away and adds {c}. What is left?",
                    f"{a} - {b} = {a - b}, and {a - b} + {c} = {a - b + c}. So {a - b + c} remain.",
                ),
                (
                    f"What is {b * 5}% of {a * 20}?",
                    f"{b * 5}% of {a * 20} is {b * 5} / 100 × {a * 20} = {b * a}.",
                ),
                (
                    f"Solve for y: {c}y - {b} = {c * a - b}",
                    f"Add {b} to both sides: {c}y = {c * a}. Divide by {c}: y = {a}.",
                ),
                (
                    f"{name} cycles {a} km before lunch and {b} km after it. How far in metres?",
                    f"In all {a + b} km, which is {(a + b) * 1000:,} m.",
                ),
            ]
        )


def tables(rng: Random) -> Iterator[Pair]:
    """Small tables, asked for or asked about."""
    while True:
        goods = rng.sample(GOODS, rng.randint(3, 4))
        prices = [rng.randint(9, 199) for _ in goods]
        stock = [rng.randint(0, 60) for _ in goods]
        listed = "，".join(f"{g}{p}元{s}件" for g, p, s in zip(goods, prices, stock, strict=True))
        rows = "\n".join(
            f"| {g} | {p} | {s} |" for g, p, s in zip(goods, prices, stock, strict=True)
        )
        grid = f"| 商品 | 单价 | 库存 |\n|---|---:|---:|\n{rows}"
        dearest = goods[prices.index(max(prices))]
        total = sum(p * s for p, s in zip(prices, stock, strict=True))
        yield rng.choice(
            [
                (f"把库存整理成表格：{listed}", grid),
                (
                    f"哪种商品最贵？\n{grid}",
                    f"单价最高的是{dearest}，{max(prices)}元。",
                ),
                (
                    f"根据下表计算全部存货的价值。\n{grid}",
                    " + ".join(f"{p}×{s}" for p, s in zip(prices, stock, strict=True))
                    + f" = {total}元",
                ),
                (
                    f"按价格从低到高排列：{listed}",
                    " < ".join(sorted(goods, key=lambda g: prices[goods.index(g)])),
                ),
                (
                    f"用CSV格式写出：{listed}",
                    f"商品,单价,库存\n{rows}".replace(" | ", ",")
                    .replace("| ", "")
                    .replace(" |", ""),
                ),
            ]
        )
