"""Template of the inspector's page, in Jinja. A string and not a file, so that it is there wherever the package is.

It is rendered with `autoescape`: nothing here may be marked as safe but the style.
"""

TEMPLATE = """\
{%- macro bdi(text) %}<bdi>{{ text }}</bdi>{% endmacro -%}

{%- macro lines(text) %}
  {%- for line in text.split("\\n") %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}
{%- endmacro -%}

{%- macro fact(name, value, class="") %}
<div{% if class %} class="{{ class }}"{% endif %}><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{%- endmacro -%}

{%- macro rows(ticks) %}
  {% for tick in ticks %}
<line class="grid" x2="100%" y1="{{ tick.at | from_top }}" y2="{{ tick.at | from_top }}"/>
<text x="-8" y="{{ tick.at | from_top }}" dy="4" text-anchor="end">{{ tick.value | number }}</text>
  {% endfor %}
{%- endmacro -%}

{%- macro columns(ticks, grid) %}
  {% for tick in ticks %}
    {% if grid %}
<line class="grid" y2="100%" x1="{{ tick.at | place }}" x2="{{ tick.at | place }}"/>
    {% endif %}
<text x="{{ tick.at | place }}" y="100%" dy="18" text-anchor="middle">{{ tick.value | number }}</text>
  {% endfor %}
{%- endmacro -%}

{%- macro axes(across, upwards) %}
<line class="axis" x2="100%" y1="100%" y2="100%"/>
<text x="-38" y="-20">{{ upwards }}</text>
<text x="50%" y="100%" dy="40" text-anchor="middle">{{ across }}</text>
{%- endmacro -%}

{%- macro counts(sample) %}
  {%- for kind in kinds[:3] %}
    {{- ", " if not loop.first }}{{ sample.count(kind) | number }} {{ labels[kind] }}
  {%- endfor %}
{%- endmacro -%}

{%- macro bar(pack) %}
<svg class="bar" viewBox="0 0 {{ pack.length }} 10" preserveAspectRatio="none" role="img"
  aria-label="Pack {{ pack.number }}: {{ counts(pack) }}, {{ pack.count("padding") | number }} padding">
  {% for sample in pack.samples %}
<g class="sample"><title>{{ sample.key }}
{{ sample.length | number }} tokens: {{ counts(sample) }}</title>
    {% for span in sample.spans %}
<rect class="{{ span.kind }}" x="{{ span.start }}" width="{{ span.length }}" height="10"/>
    {% endfor %}
</g>
  {% endfor %}
  {% if pack.tokens < pack.length %}
<g><title>{{ pack.count("padding") | number }} positions of padding</title>
<rect class="padding" x="{{ pack.tokens }}" width="{{ pack.count("padding") }}" height="10"/></g>
  {% endif %}
  {% for sample in pack.samples if sample.start + sample.length < pack.length %}
<path class="border" d="M{{ sample.start + sample.length }} 0V10"/>
  {% endfor %}
</svg>
{%- endmacro -%}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ it.name }}: shards and packs</title>
<style>{{ css }}</style>
</head>
<body>
<header>
<p class="eyebrow">Shards and packs</p>
<h1>{{ bdi(it.name) }}</h1>
{% for path in it.paths %}
<p class="path mono">{{ bdi(path) }}</p>
{% endfor %}
<dl class="facts">
{{ fact("Shards", it.num_shards | number) }}
{{ fact("Samples", it.num_samples | number) }}
{{ fact("Texts", it.lengths.size | number) }}
{{ fact("Pictures", num_pictures | number) }}
{{ fact("Size", it.num_bytes | size) }}
{{ fact("Bad samples", it.bad | length | number, "alarm" if it.bad else "") }}
{{ fact("Fingerprint", it.fingerprint, "mono") }}
</dl>
<details class="settings"><summary>Settings of the recipe</summary>
<dl class="small">
{% for name, value in it.settings.items() %}
{{ fact(name, bdi(value)) }}
{% endfor %}
</dl></details>
<nav aria-label="Sections">
<a href="#packs">Packs</a>
<a href="#lengths">Token lengths</a>
<a href="#pictures">Picture sizes</a>
<a href="#samples">Samples</a>
<a href="#bad">Bad samples ({{ it.bad | length | number }})</a>
</nav>
</header>
<main>

<section id="packs" aria-labelledby="packs-title">
<h2 id="packs-title">Packs of the first epoch</h2>
<p class="lead">One text a sample, in packs of {{ it.epoch.max_length | number }} tokens.
{% if it.packs | length < it.epoch.packs %}
The first {{ it.packs | length }} of {{ it.epoch.packs | number }} packs are drawn.
{% else %}
All of them are drawn.
{% endif %}
A pack opens to a list of its samples.</p>
<dl class="facts">
{{ fact("Packs", it.epoch.packs | number) }}
{{ fact("Lower bound", it.epoch.lower_bound | number) }}
{{ fact("Packs / bound", "%.3f" | format(it.epoch.packs / it.epoch.lower_bound)) }}
{{ fact("Padding", it.epoch.padding | percent) }}
{{ fact("Samples packed", it.epoch.texts | number) }}
{{ fact("Samples a pack", "%.1f" | format(it.epoch.texts / it.epoch.packs)) }}
{{ fact("Global steps", it.epoch.steps | number) }}
</dl>
<ul class="legend" aria-label="Kinds of positions">
<li class="meta">Positions of the packs drawn:</li>
{% for kind in kinds %}
<li><svg aria-hidden="true"><rect class="{{ kind }} swatch" width="100%" height="100%"/></svg>
{{ labels[kind] }} <span>{{ shares[kind] | percent }}</span></li>
{% endfor %}
</ul>
<ol class="packs">
{% for pack in it.packs %}
<li><details>
<summary><span class="number" aria-hidden="true">{{ pack.number }}</span>
{{ bar(pack) }}
<span class="fill">{{ pack.samples | length }} sample{{ "s" if pack.samples | length != 1 }},
{{ (pack.tokens / pack.length) | percent }} full</span></summary>
<div class="inside"><table>
<thead><tr><th scope="col">Key</th><th scope="col" class="figure">Tokens</th>
  {% for kind in kinds[:3] %}
<th scope="col" class="figure">{{ headings[kind] }}</th>
  {% endfor %}
</tr></thead>
<tbody>
  {% for sample in pack.samples %}
<tr><td class="key">{{ bdi(sample.key) }}</td><td class="figure">{{ sample.length | number }}</td>
    {% for kind in kinds[:3] %}
<td class="figure">{{ sample.count(kind) | number }}</td>
    {% endfor %}
</tr>
  {% endfor %}
</tbody></table></div>
</details></li>
{% endfor %}
</ol>
<div class="ruler" aria-hidden="true"><svg>
{% for anchor in ("start", "middle", "middle", "middle", "end") %}
<line class="axis" x1="{{ 25 * loop.index0 }}%" x2="{{ 25 * loop.index0 }}%" y2="5"/>
<text x="{{ 25 * loop.index0 }}%" y="18" text-anchor="{{ anchor }}">
{{- (it.epoch.max_length * loop.index0 // 4) | number }}{{ " tokens" if loop.last }}</text>
{% endfor %}
</svg></div>
</section>

<div class="pair">
<section id="lengths" aria-labelledby="lengths-title">
<h2 id="lengths-title">Token lengths</h2>
<p class="lead">All {{ it.lengths.size | number }} texts of the index, each with its pictures.</p>
<figure class="axes"><svg role="img" aria-label="Histogram of token lengths: {{ length_facts }}">
{{ rows(lengths.y_ticks) }}
{% for bar in lengths.bars %}
<rect class="count" x="{{ bar.x | place }}" y="{{ bar.height | from_top }}"
  width="{{ (0.9 * bar.width) | place }}" height="{{ bar.height | place }}"><title>{{ bar.first | number }}
  {%- if bar.last > bar.first %} to {{ bar.last | number }}{% endif %} tokens: {{ bar.count | number }} texts</title>
</rect>
{% endfor %}
{{ columns(lengths.x_ticks, grid=False) }}
{% if lengths.limit_at is not none %}
<line class="limit" x1="{{ lengths.limit_at | place }}" x2="{{ lengths.limit_at | place }}" y2="100%"/>
<text x="{{ lengths.limit_at | place }}" dx="-6" y="12" text-anchor="end">pack:
{{ it.epoch.max_length | number }}</text>
{% endif %}
{{ axes("Tokens of a text", "Texts") }}
</svg></figure>
<dl class="small">
{% for name, value in length_table %}
{{ fact(name, value | number) }}
{% endfor %}
</dl>
</section>

<section id="pictures" aria-labelledby="pictures-title">
<h2 id="pictures-title">Picture sizes</h2>
{% if sizes is none %}
<p class="lead">No sample has a picture.</p>
{% else %}
<p class="lead">All {{ num_pictures | number }} pictures as stored, in {{ sizes.distinct | number }}
size{{ "s" if sizes.distinct != 1 }}; the area of a dot is the number of pictures of about that size.</p>
<figure class="axes"><svg role="img" aria-label="Scatter plot of picture widths and heights: {{ size_facts }}">
{{ rows(sizes.y_ticks) }}
{{ columns(sizes.x_ticks, grid=True) }}
<line class="axis" y2="100%"/>
  {% for dot in sizes.dots %}
<circle class="dot" cx="{{ dot.x | place }}" cy="{{ dot.y | from_top }}" r="{{ "%.1f" | format(dot.radius) }}">
<title>about {{ dot.width }} × {{ dot.height }}: {{ dot.count | number }} picture{{ "s" if dot.count != 1 }}</title>
</circle>
  {% endfor %}
{{ axes("Width in pixels", "Height in pixels") }}
</svg></figure>
<table>
<thead><tr><th scope="col">Most frequent sizes</th><th scope="col" class="figure">Pictures</th>
<th scope="col" class="figure">Share</th></tr></thead>
<tbody>
  {% for width, height, count in sizes.common %}
<tr><td>{{ width | number }} × {{ height | number }}</td><td class="figure">{{ count | number }}</td>
<td class="figure">{{ (count / num_pictures) | percent }}</td></tr>
  {% endfor %}
</tbody></table>
{% endif %}
</section>
</div>

<section id="samples" aria-labelledby="samples-title">
<h2 id="samples-title">Samples as the model sees them</h2>
<p class="lead">The first {{ it.cards | length | number }} of the packs above. A picture is its global view, squeezed
to {{ it.view_side | number }} × {{ it.view_side | number }} pixels; text is spelt from the tokens. <mark>Marked</mark>
tokens are learnt, <span class="special">&lt;gray&gt;</span> ones are special tokens and pictures.</p>
<ul class="cards">
{% for card in it.cards %}
<li class="card">
  {% if card.pictures %}
<div class="pictures">
    {% for picture in card.pictures %}
<img src="{{ picture }}" width="112" height="112" alt="Picture {{ loop.index }} of {{ card.key }}">
    {% endfor %}
</div>
  {% endif %}
<div class="says"><h3 class="key">{{ bdi(card.key) }}</h3>
<p class="meta">{{ card.length | number }} tokens, pack {{ card.pack }}
  {%- if card.patches %}, {{ card.patches | number }} local patches{% endif %}
  {%- if card.hidden_pictures %}, {{ card.hidden_pictures | number }} more pictures{% endif %}</p>
<p class="spoken"><bdi>
  {%- for piece in card.pieces %}
    {%- if piece.learnt %}<mark>{% endif %}
    {%- if piece.kind == "text" %}{{ lines(piece.text) }}
    {%- else %}<span class="special">{{ piece.text }}</span>{% endif %}
    {%- if piece.learnt %}</mark>{% endif %}
  {%- endfor %}</bdi>
  {%- if card.hidden_characters %} <span class="meta">and {{ card.hidden_characters | number }} more characters</span>
  {%- endif %}</p>
</div></li>
{% endfor %}
</ul>
</section>

<section id="bad" aria-labelledby="bad-title">
<h2 id="bad-title">Bad samples</h2>
{% if it.bad %}
<p class="lead">{{ it.bad | length | number }}, found by indexing or by reading the packs above
  {%- if it.bad | length > bad | length %}; the first {{ bad | length | number }} are listed{% endif %}.
None of them is trained on.</p>
<table class="stacked">
<thead><tr>
  {% for name in bad_columns %}
<th scope="col">{{ name | capitalize }}</th>
  {% endfor %}
</tr></thead>
<tbody>
  {% for record in bad %}
<tr>
    {% for name in bad_columns %}
<td data-name="{{ name | capitalize }}" class="{{ "reason" if name == "reason" else "key" }}">
      {{- bdi(record[name] or "–") }}</td>
    {% endfor %}
</tr>
  {% endfor %}
</tbody></table>
{% else %}
<p class="good">None: all {{ it.num_samples | number }} samples of the index can be used, and those of the packs above
were read.</p>
{% endif %}
</section>

</main>
<footer>One file without scripts; it loads nothing. Point at a bar or a dot for its figures.</footer>
</body>
</html>
"""
