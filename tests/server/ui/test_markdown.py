"""What the page makes of Markdown, in headless Chromium; the expected trees follow CommonMark and the tables of GFM."""

from __future__ import annotations

import json

import pytest

RENDER = """import("/ui/markdown.js").then(({ renderMarkdown }) => {
    const node = document.createElement("div");
    node.append(...renderMarkdown(%s));
    for (const caption of node.querySelectorAll("figcaption")) caption.remove();
    for (const each of node.querySelectorAll("*")) {
        const others = each.getAttributeNames().filter((name) => !["href", "start", "class"].includes(name));
        for (const name of others) each.removeAttribute(name);
    }
    return node.innerHTML;
})"""


def code(text: str) -> str:
    return f'<figure class="code"><pre><code>{text}</code></pre></figure>'


# Headings begin at h3, because the page has its own above; a block of code is a figure.
CASES = {
    "one *two* **three *four* five** `six`": (
        "<p>one <em>two</em> <strong>three <em>four</em> five</strong> <code>six</code></p>"
    ),
    "snake_case_name _yes_ 2 * 3 * 4": "<p>snake_case_name <em>yes</em> 2 * 3 * 4</p>",
    "**unclosed and `open": "<p>**unclosed and `open</p>",
    "\\*plain\\* `` a`b `` ~~gone~~": "<p>*plain* <code>a`b</code> <del>gone</del></p>",
    "# One\n\n## Two ##\n#not": "<h3>One</h3><h4>Two</h4><p>#not</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b\n\n   c": '<ol start="3"><li><p>a</p></li><li><p>b</p><p>c</p></li></ol>',
    "1. a\n   ```\n   x = 1\n   ```\n2. b": "<ol><li>a" + code("x = 1") + "</li><li>b</li></ol>",
    "> a\nb\n> > c": "<blockquote><p>a\nb</p><blockquote><p>c</p></blockquote></blockquote>",
    "```py\nif x:\n    <b>\n\n```\nafter": code("if x:\n    &lt;b&gt;\n") + "<p>after</p>",
    "```\nopen": code("open"),
    "a\n\n    code\n\n    more\nb": "<p>a</p>" + code("code\n\nmore") + "<p>b</p>",
    "a\n***\nb  \nc": "<p>a</p><hr><p>b<br>c</p>",
    "| a | b |\n|:-:|--:|\n| 1 \\| 2 | **3** |\n\nz": (
        '<div class="table"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td class="center">1 | 2</td><td class="right"><strong>3</strong></td></tr></tbody></table></div>'
        "<p>z</p>"
    ),
    '[a *b*](https://x.y/p_(q) "t"), <https://z.w>, see https://v.u/t.': (
        '<p><a href="https://x.y/p_(q)">a <em>b</em></a>, <a href="https://z.w">https://z.w</a>, see '
        '<a href="https://v.u/t">https://v.u/t</a>.</p>'
    ),
    "[a](javascript:x) [b](/c) ![d](https://e.f/g.png)": (
        '<p><span class="nolink">a</span> <span class="nolink">b</span> <a href="https://e.f/g.png">d</a></p>'
    ),
    "<b>x</b> &lt;&amp; &copy;": "<p>&lt;b&gt;x&lt;/b&gt; &lt;&amp; &amp;copy;</p>",
}


@pytest.fixture
def open_page(serve, chromium):
    """Runs a scenario with a page."""

    def run(scenario):
        async def with_page(client, engine):
            async with chromium.page(client.address + "/") as page:
                await scenario(page)

        serve(with_page, seconds=90)

    return run


def test_markdown_becomes_the_nodes_it_means(open_page):
    async def scenario(page):
        for source, expected in CASES.items():
            assert await page.evaluate(RENDER % json.dumps(source)) == expected, source

    open_page(scenario)


def test_a_text_that_grows_ends_as_the_whole_text(open_page):
    async def scenario(page):
        source = "\n\n".join(case for case in CASES if not case.endswith("open"))  # which would take in the rest
        script = f"""import("/ui/markdown.js").then(({{ MarkdownView, renderMarkdown }}) => {{
            const source = {json.dumps(source)};
            const [growing, whole] = [document.createElement("div"), document.createElement("div")];
            const view = new MarkdownView(growing);
            let first = null;
            for (let end = 1; end <= source.length; end += 1) {{
                view.update(source.slice(0, end));
                if (end === 60) first = growing.firstChild;
            }}
            whole.append(...renderMarkdown(source));
            return [growing.innerHTML === whole.innerHTML, growing.firstChild === first, whole.children.length];
        }})"""
        same, kept, count = await page.evaluate(script)
        assert same and kept and count > 20  # and what was complete was not made anew

    open_page(scenario)


def test_no_text_takes_long(open_page):
    async def scenario(page):
        hard = ["*a ", "**", "_a", "[", "[a](", "`` ` ", ">", "- ", "|-", "#", "a|\n", "~~x", "<h", "&", "\\", "1. a\n"]
        script = f"""import("/ui/markdown.js").then(({{ renderMarkdown }}) => {json.dumps(hard)}.map((piece) => {{
            const begun = performance.now();
            renderMarkdown(piece.repeat(20000 / piece.length));
            return performance.now() - begun;
        }}))"""
        taken = dict(zip(hard, await page.evaluate(script), strict=True))
        assert max(taken.values()) < 2000, taken  # milliseconds

    open_page(scenario)
