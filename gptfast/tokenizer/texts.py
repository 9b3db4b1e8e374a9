"""Five short texts, written for this project, on which tokenizers are compared."""

NEWS = """\
HARBOUR CITY, March 14 – The regional council voted 23 to 16 on Tuesday night to close the old \
swing bridge to cars for at least 18 months, ending a dispute that has divided shopkeepers and \
commuters since engineers found cracks in two of its main girders last autumn.

Under the plan, buses, bicycles and ambulances may still cross between 6 a.m. and 10 p.m., while \
private vehicles must take the northern bypass, a detour of roughly 7.5 kilometres. The repairs \
are expected to cost $41.2 million, about a third of which will come from the national government.

"Nobody on this council enjoys telling 19,000 drivers a day to find another way home," said the \
chairwoman, Marit Osei, after the four-hour debate. "But we were shown photographs of that steel, \
and I wouldn't send my own children over it in rush hour."

Opponents argued that the figures were out of date and that a lower weight limit would've been \
enough. Daniel Whitcombe, who runs a bakery on Quay Street, said that he'd lost a fifth of his \
customers during last year's inspections. "They're promising free parking on the other bank," he \
said. "People who want bread at seven in the morning don't park. They stop."

The council's own forecast, published on Monday, expects traffic on the bypass to grow by 31 per \
cent and average journeys to take nine minutes longer. A spokesperson for the transport union \
welcomed the decision but warned that 12 additional drivers would be needed before the closure \
begins on 2 May. The ferry company, which stopped its service in 2009, has said that it's \
"looking seriously" at a return.
"""

KOREAN = """\
비가 그친 뒤의 골목은 언제나 조금 더 넓어 보였다. 할머니는 가게 문을 열고 젖은 의자를 하나씩 \
밖으로 내놓으셨다. 나는 그 옆에서 빗자루를 들고 물웅덩이를 밀어냈지만, 물은 금세 다시 \
모여들었다. "그냥 두어라, 해가 나면 저절로 마를 것을." 할머니는 웃으며 그렇게 말씀하셨다.

우리 동네에는 오래된 우체국이 하나 있다. 1970년대에 지어진 그 건물은 이제 편지보다 택배가 더 \
많이 오가지만, 벽에 걸린 시계만은 여전히 정확하다. 아침 아홉 시가 되면 직원 세 사람이 나란히 \
서서 인사를 하고, 문 앞에서 기다리던 사람들은 번호표를 뽑는다. 어떤 날은 줄이 길어서 삼십 분을 \
기다려야 할 때도 있다. 그래도 아무도 화를 내지 않는다. 서로의 안부를 묻다 보면 시간이 빨리 \
지나가기 때문이다.

그날 오후, 나는 처음으로 혼자서 편지를 부쳤다. 바다 건너에 사는 친구에게 보내는 편지였다. \
봉투에 주소를 쓰는 동안 손이 떨렸고, 우표를 붙일 때는 숨을 참았다. 일주일 뒤에 답장이 도착했을 \
때, 할머니는 나보다 더 기뻐하시며 떡을 한 접시 가득 담아 주셨다.
"""

CODE = '''\
from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(order=True)
class Visit:
    cost: float
    node: str = field(compare=False)


class RoadMap:
    """A weighted graph whose edges can be travelled in both directions."""

    def __init__(self, edges: list[tuple[str, str, float]]) -> None:
        self._neighbours: dict[str, dict[str, float]] = defaultdict(dict)
        for start, end, length in edges:
            if length < 0:
                raise ValueError(f"negative length {length!r} between {start} and {end}")
            self._neighbours[start][end] = length
            self._neighbours[end][start] = length

    def shortest(self, start: str, goal: str) -> tuple[float, list[str]]:
        best = {start: 0.0}
        came_from: dict[str, str] = {}
        queue = [Visit(0.0, start)]
        while queue:
            visit = heapq.heappop(queue)
            if visit.node == goal:
                break
            for node, length in self._neighbours[visit.node].items():
                cost = visit.cost + length
                if cost < best.get(node, float("inf")):
                    best[node] = cost
                    came_from[node] = visit.node
                    heapq.heappush(queue, Visit(cost, node))
        path = [goal]
        while path[-1] != start:
            path.append(came_from[path[-1]])  # KeyError: no way leads there
        return best[goal], path[::-1]


if __name__ == "__main__":
    roads = RoadMap([("A", "B", 7.0), ("A", "C", 9.5), ("B", "C", 1.25), ("C", "D", 6.0)])
    print(roads.shortest("A", "D"))  # (14.25, ['A', 'B', 'C', 'D'])
'''

MATH = r"""
\documentclass[11pt]{article}
\usepackage{amsmath,amssymb,amsthm}
\newtheorem{lemma}{Lemma}
\newcommand{\E}{\mathbb{E}}
\newcommand{\norm}[1]{\left\lVert #1 \right\rVert}

\begin{document}

\begin{lemma}[Descent]\label{lem:descent}
Let $f\colon \mathbb{R}^n \to \mathbb{R}$ be differentiable with an $L$-Lipschitz gradient, and let
$x_{k+1} = x_k - \eta \nabla f(x_k)$ with $0 < \eta \le \tfrac{1}{L}$. Then
\begin{equation}
  f(x_{k+1}) \;\le\; f(x_k) - \frac{\eta}{2} \norm{\nabla f(x_k)}_2^2 .
  \label{eq:descent}
\end{equation}
\end{lemma}

\begin{proof}
Along the segment $x_k + t\,(x_{k+1} - x_k)$, $t \in [0, 1]$, the fundamental theorem of calculus
gives
\begin{align*}
  f(x_{k+1}) - f(x_k)
    &= \int_0^1 \bigl\langle \nabla f\bigl(x_k + t(x_{k+1} - x_k)\bigr),\,
       x_{k+1} - x_k \bigr\rangle \, dt \\
    &\le \bigl\langle \nabla f(x_k),\, x_{k+1} - x_k \bigr\rangle
       + \frac{L}{2} \norm{x_{k+1} - x_k}_2^2 \\
    &= -\eta \Bigl( 1 - \frac{L \eta}{2} \Bigr) \norm{\nabla f(x_k)}_2^2 ,
\end{align*}
and $1 - L\eta/2 \ge 1/2$ by the choice of $\eta$.
\end{proof}

Summing \eqref{eq:descent} over $k = 0, 1, \dots, K - 1$ and writing
$f^\star = \inf_x f(x) > -\infty$,
\[
  \min_{0 \le k < K} \norm{\nabla f(x_k)}_2^2 \;\le\; \frac{2\,\bigl(f(x_0) - f^\star\bigr)}{\eta K}
  = \mathcal{O}\!\left(\frac{1}{K}\right).
\]
If moreover $\E[g_k \mid x_k] = \nabla f(x_k)$ and
$\E \norm{g_k - \nabla f(x_k)}_2^2 \le \sigma^2$, then $\eta \propto 1/\sqrt{K}$ yields
$\mathcal{O}(\sigma/\sqrt{K})$, and for $\sum_{k} \eta_k = \infty$, $\sum_{k} \eta_k^2 < \infty$
one has $\liminf_{k \to \infty} \norm{\nabla f(x_k)}_2 = 0$ almost surely.

\end{document}
"""

SCIENCE = """\
A glacier looks still, but it is a river in slow motion. Snow that falls high on a mountain is \
buried by the snow of later winters, and its own weight squeezes the air out of it until, after \
decades, the flakes have become dense blue ice. Once that ice is some thirty metres thick, it \
begins to flow. Crystals slide past one another along planes of molecules, in the same way that a \
pack of cards spreads when it is pushed, and the whole mass creeps downhill by anything from a few \
centimetres to several metres a day.

Water makes the difference between the slow glaciers and the fast ones. In summer, streams of \
meltwater plunge through shafts in the ice and spread out beneath it, where the pressure lifts the \
glacier slightly off its bed and lets it slip. Satellites that measure the height of the surface \
to within ten centimetres can see this happen: the ice rises at noon, accelerates, and sinks again \
during the night. By autumn the water has carved wide channels, the pressure falls, and the \
glacier slows down although more water than ever is flowing underneath it.

Locked inside are tiny bubbles of ancient atmosphere. A core drilled through three kilometres of \
Antarctic ice holds air as old as 800,000 years, and the carbon dioxide in it rises and falls with \
the temperature, from about 180 parts per million in ice ages to 280 in the warm periods between.
"""

TEXTS = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}
