"""Template of the report, in Jinja. A string and not a file, so that it is there wherever the package is.

It is rendered with `autoescape`: nothing here may be marked as safe but the style.
"""

TEMPLATE = """\
{%- macro bdi(text) %}<bdi>{{ text }}</bdi>{% endmacro -%}

{%- macro lines(text) %}
  {%- for line in text.split("\\n") %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}
{%- endmacro -%}

{%- macro told(texts) %}
<title>
  {%- for text in texts %}{{ text }}
  {% endfor %}</title>
{%- endmacro -%}

{%- macro table(values) %}
<table class="values"><tbody>
  {% for name, value in values %}
<tr><th scope="row">{{ name }}</th><td>{{ bdi(value) }}</td></tr>
  {% endfor %}
</tbody></table>
{%- endmacro -%}

{%- macro chart(plot, bands) %}
<figure class="chart">
<figcaption><h3>{{ bdi(plot.title) }}</h3>{% if plot.unit %}<span class="meta">{{ plot.unit }}</span>{% endif %}
</figcaption>
<div class="axes"><svg role="img" aria-label="{{ plot.title }} over steps:
  {%- for line in plot.lines %} {{ line.name }}, last {{ line.last }}{{ ";" if not loop.last }}{% endfor %}">
<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">
  {% for band in bands %}
<rect class="band{{ band.index % 3 }}" x="{{ "%.3f" | format(band.x) }}" width="{{ "%.3f" | format(band.width) }}"
  height="100"/>
  {% endfor %}
</svg>
  {% for tick in plot.y_ticks %}
<line class="grid" x2="100%" y1="{{ tick.at | from_top }}" y2="{{ tick.at | from_top }}"/>
<text x="-8" y="{{ tick.at | from_top }}" dy="4" text-anchor="end">{{ tick.label }}</text>
  {% endfor %}
  {% for tick in plot.x_ticks %}
<text x="{{ tick.at | place }}" y="100%" dy="17" text-anchor="middle">
  {{- "step " if loop.first }}{{ tick.label }}</text>
  {% endfor %}
<line class="axis" x2="100%" y1="100%" y2="100%"/>
<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">
  {% for line in plot.lines if line.area %}
<path class="area c{{ line.colour }}" d="{{ line.area }}"/>
  {% endfor %}
  {% for line in plot.lines if line.path %}
<path class="line c{{ line.colour }}{{ " dashed" if line.dashed }}" d="{{ line.path }}"/>
  {% endfor %}
</svg>
  {% for line in plot.lines %}
    {% for x, y in line.dots %}
<circle class="dot c{{ line.colour }}" cx="{{ x | place }}" cy="{{ y | place }}" r="4"/>
    {% endfor %}
  {% endfor %}
  {% for spot in plot.spots %}
<rect class="spot" x="{{ spot.x | place }}" width="{{ spot.width | place }}" height="100%">{{ told(spot.title) }}</rect>
  {% endfor %}
</svg></div>
<ul class="legend">
  {% for line in plot.lines %}
<li><svg aria-hidden="true"><line class="line c{{ line.colour }}{{ " dashed" if line.dashed }}" x2="18" y1="5" y2="5"/>
</svg><span>{{ bdi(line.name) }} <span class="value">{{ line.last }}</span></span></li>
  {% endfor %}
</ul>
  {% for line in plot.lines if line.not_finite %}
<p class="alarm">{{ bdi(line.name) }}: {{ line.not_finite[0] | number }}
value{{ "s" if line.not_finite[0] != 1 }} not finite, first at step {{ line.not_finite[1] | number }}</p>
  {% endfor %}
</figure>
{%- endmacro -%}

{%- macro result_table(results) %}
<table class="results">
<thead><tr><th scope="col">Value</th>
  {% for column in ("First", "Best", "Last") %}
<th scope="col" class="figure">{{ column }}</th>
  {% endfor %}
</tr></thead>
<tbody>
  {% for result in results %}
<tr><td class="key"><bdi>
      {%- for part in result.name.split("_") %}{{ part }}{% if not loop.last %}_<wbr>{% endif %}{% endfor %}</bdi></td>
    {% for found in (result.first, result.best, result.last) %}
<td class="figure">{% if found %}{{ found[1] }} <small>step {{ found[0] | number }}</small>{% else %}–{% endif %}</td>
    {% endfor %}
</tr>
  {% endfor %}
</tbody></table>
{%- endmacro -%}

{%- macro attempt(it) %}
<div><h4>Step {{ it.step | number }} <span class="score">{{ "%.2f" | format(it.caption.cider_d) }}</span>
{%- if it.caption.finish == "length" %} <span class="alarm">cut off</span>{% endif %}</h4>
<p><bdi>
  {%- for text, unknown in it.pieces %}
    {%- if unknown %}<mark>{{ lines(text) }}</mark>{% else %}{{ lines(text) }}{% endif %}
  {%- else %}<span class="meta">empty</span>{% endfor %}</bdi></p></div>
{%- endmacro -%}

{%- macro sample(card) %}
<li class="sample">
<div class="pictures">
  {% for uri in pictures[card.key] %}
<img src="{{ uri }}" alt="Picture {{ loop.index }} of {{ card.key }}">
  {% else %}
<div class="no-picture">no picture kept</div>
  {% endfor %}
</div>
<div class="said"><div class="head"><h3 class="key">{{ bdi(card.key) }}</h3>
  {% if card.shown | length > 1 %}
<span class="meta">CIDEr-D {{ "%+.2f" | format(card.change) }} from first to last</span>
  {% endif %}
</div>
<h4>References</h4>
<ul>
  {% for reference in card.references %}
<li><bdi>{{ lines(reference) }}</bdi></li>
  {% endfor %}
</ul>
<div class="columns">
  {% for each in card.shown %}
{{ attempt(each) }}
  {% endfor %}
</div>
  {% if card.hidden %}
<details class="more"><summary>{{ card.hidden | length }} more
validation{{ "s" if card.hidden | length != 1 }}</summary>
<div class="columns">
    {% for each in card.hidden %}
{{ attempt(each) }}
    {% endfor %}
</div></details>
  {% endif %}
</div></li>
{%- endmacro -%}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ name }}: report of a run</title>
<style>{{ css }}</style>
</head>
<body>
<header>
<p class="eyebrow">Report of a run</p>
<h1>{{ bdi(name) }}</h1>
<p class="path mono">{{ bdi(path) }}</p>
<p class="state {{ state.word }}"><strong>{{ state.word }}</strong> <span>{{ state.detail }}</span></p>
<dl class="facts">
{% for fact in facts %}
<div{% if fact.alarm %} class="alarm"{% endif %}><dt>{{ fact.name }}</dt><dd>{{ fact.value }}
  {%- if fact.note %} <small>{{ fact.note }}</small>{% endif %}</dd></div>
{% endfor %}
</dl>
<nav aria-label="Sections">
<a href="#curves">Curves</a>
<a href="#validations">Validations</a>
<a href="#captions">Captions</a>
<a href="#experts">Expert load</a>
<a href="#bad">Bad samples ({{ bad_count | number }})</a>
<a href="#setup">Setup</a>
</nav>
</header>
<main>

<section id="curves" aria-labelledby="curves-title">
<h2 id="curves-title">Curves</h2>
{% if plots or other_plots %}
<p class="lead">Over optimizer steps. Numbers are the last ones.
{% if span > 1 %}
Where there are many, a curve is the mean of {{ span | number }} steps each, in a strip from the least to the most of
them.
{% endif %}
</p>
  {% if bands %}
<ul class="legend stages" aria-label="Stages of the freezing schedule">
<li class="meta">Stages:</li>
    {% for band in bands %}
<li><svg aria-hidden="true"><rect class="band{{ band.index % 3 }}" width="100%" height="100%"/></svg>
<span>{{ bdi(band.name) }} <span class="meta">
      {%- if band.first == band.last %}step {{ band.first | number }}
      {%- else %}steps {{ band.first | number }} to {{ band.last | number }}{% endif %}
      {%- if band.trains %}, {{ bdi(band.trains) }}{% endif %}</span></span></li>
    {% endfor %}
</ul>
  {% endif %}
<div class="charts">
  {% for plot in plots %}
{{ chart(plot, bands) }}
  {% endfor %}
</div>
  {% if other_plots %}
<details class="more"><summary>{{ other_plots | length }} more logged
value{{ "s" if other_plots | length != 1 }}</summary>
<div class="charts">
    {% for plot in other_plots %}
{{ chart(plot, bands) }}
    {% endfor %}
</div></details>
  {% endif %}
{% else %}
<p class="lead">Nothing has been logged yet.</p>
{% endif %}
</section>

<section id="validations" aria-labelledby="validations-title">
<h2 id="validations-title">Validations</h2>
{% if results %}
{{ result_table(results) }}
  {% if other_results %}
<details class="more"><summary>{{ other_results | length }} values of parts</summary>
{{ result_table(other_results) }}</details>
  {% endif %}
{% else %}
<p class="lead">There has been no validation yet.</p>
{% endif %}
</section>

<section id="captions" aria-labelledby="captions-title">
<h2 id="captions-title">Captions</h2>
{% if galleries %}
<p class="lead">Generated captions of the validation split beside their references, with CIDEr-D behind the step. Words
that no reference has are <mark>marked</mark>.</p>
  {% for split, count, groups in galleries %}
    {% for group in groups %}
<h3 class="group">{{ group.title }} of {{ count | number }}{% if split %}, {{ split }}{% endif %}</h3>
<ul class="samples">
      {% for card in group.cards %}
{{ sample(card) }}
      {% endfor %}
</ul>
    {% endfor %}
  {% endfor %}
{% else %}
<p class="lead">No captions were generated at validations.</p>
{% endif %}
</section>

<section id="experts" aria-labelledby="experts-title">
<h2 id="experts-title">Expert load</h2>
{% if heat %}
<p class="lead">Tokens of each routed expert as a multiple of its layer's mean, at step {{ heat.step | number }}
({{ heat.tokens | number }} choices a layer). A row is a layer, a column an expert.</p>
<figure class="heat"><div class="axes"><svg role="img" class="tall" height="{{ heat_height }}"
  aria-label="Heat map of expert load: {{ heat.rows | length }} layers of {{ heat.experts }} experts">
<svg viewBox="0 0 {{ heat.experts }} {{ heat.rows | length }}" preserveAspectRatio="none" width="100%" height="100%"
  class="{{ "fine" if heat.experts > 64 else "coarse" }}">
  {% for row in heat.rows %}
    {% for level, path in row.cells %}
<path class="h{{ level }}" d="{{ path }}"/>
    {% endfor %}
  {% endfor %}
</svg>
  {% for row in heat.rows %}
    {% if loop.index0 % label_every == 0 %}
<text x="-8" y="{{ (100 * (loop.index0 + 0.5) / heat.rows | length) | place }}" dy="4"
  text-anchor="end">{{ row.layer }}</text>
    {% endif %}
<rect class="spot" y="{{ (100 * loop.index0 / heat.rows | length) | place }}" width="100%"
  height="{{ (100 / heat.rows | length) | place }}">{{ told(row.title) }}</rect>
  {% endfor %}
  {% for tick in heat.ticks %}
<text x="{{ tick.at | place }}" y="100%" dy="17" text-anchor="middle">{{ tick.label }}</text>
  {% endfor %}
</svg></div></figure>
<ul class="legend levels" aria-label="Tokens of an expert">
  {% for level in levels %}
<li><svg aria-hidden="true"><rect class="h{{ loop.index0 }}" width="100%" height="100%"/></svg>{{ level }}</li>
  {% endfor %}
</ul>
<div class="charts">
  {% for plot in balance_plots %}
{{ chart(plot, bands) }}
  {% endfor %}
</div>
{% else %}
<p class="lead">No expert load was recorded.</p>
{% endif %}
</section>

<section id="bad" aria-labelledby="bad-title">
<h2 id="bad-title">Bad samples</h2>
{% if bad %}
<p class="lead">{{ bad_count | number }}, none of them trained on
  {%- if bad_count > bad | length %}; the first {{ bad | length | number }} are listed{% endif %}.</p>
<table class="stacked">
<thead><tr>
  {% for column in bad_columns %}
<th scope="col">{{ column | capitalize }}</th>
  {% endfor %}
</tr></thead>
<tbody>
  {% for record in bad %}
<tr>
    {% for column in bad_columns %}
<td data-name="{{ column | capitalize }}" class="{{ {"met": "met", "reason": "reason"}.get(column, "key") }}">
      {{- bdi(record[column]) }}</td>
    {% endfor %}
</tr>
  {% endfor %}
</tbody></table>
{% else %}
<p class="good">None was met.</p>
{% endif %}
</section>

<section id="setup" aria-labelledby="setup-title">
<h2 id="setup-title">Setup</h2>
<div class="pair">
<div><h3>Recipe</h3>
{{ table(recipe) if recipe else "No config.yaml: the run was not started from the command line." }}
</div>
<div><h3>Process that wrote this page</h3>
{{ table(environment) }}
</div>
</div>
{% if checkpoints %}
<h3 class="group">Checkpoints</h3>
<table class="stacked">
<thead><tr><th scope="col">File</th><th scope="col" class="figure">Size</th><th scope="col" class="figure">Written</th>
</tr></thead>
<tbody>
  {% for name, size, written in checkpoints %}
<tr><td class="key" data-name="File">{{ bdi(name) }}</td><td class="figure" data-name="Size">{{ size | size }}</td>
<td class="figure" data-name="Written">{{ written }}</td></tr>
  {% endfor %}
</tbody></table>
{% endif %}
{% if config_text %}
<details class="more"><summary>config.yaml in full</summary>
<pre>
{% for line in config_text.splitlines() %}
{{ line }}
{% endfor %}
</pre></details>
{% endif %}
</section>

</main>
<footer>Written {{ now }}. One file without scripts; it loads nothing. Point at a curve or a row for its
figures.</footer>
</body>
</html>
"""
