"""The page's HTML, a Jinja template; `helpers.report.page` fills it in. Nothing in it is loaded from elsewhere."""

PAGE = """{% macro rows_of(made) %}
{% for command in made.commands %}<code>{{ command }}</code>{{ "; " if not loop.last }}{% endfor %}
{{ "; " if made.commands and made.rest }}{{ "not among the committed sweeps: " ~ made.rest if made.rest }}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>Mechanistic unlearning: report</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 90em; margin: 1.5em auto; padding: 0 1.2em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2.2em; border-bottom: 1px solid #ccc } h3 { font-size: 1em; margin-bottom: .3em }
table { border-collapse: collapse; font-size: .87em } th, td { text-align: left; vertical-align: top; padding: .35em .7em .35em 0 }
thead th { border-bottom: 2px solid #999 } tbody tr { border-top: 1px solid #e4e4e4 }
.family th { background: #f1f1f1; padding: .5em } .claim { min-width: 20em; max-width: 28em } .cell { min-width: 13em; max-width: 19em }
.holds { color: #0072b2; font-weight: bold } .fails { color: #d55e00; font-weight: bold } .undecided { color: #555; font-weight: bold }
.small, .none { color: #555; font-size: .92em } .number { white-space: nowrap } .scroll { overflow-x: auto }
code { background: #f3f3f3; padding: .1em .3em } img { max-width: 100% } details { margin: .2em 0 } summary { cursor: pointer; color: #444 }
</style>
</head>
<body>
<h1>Mechanistic unlearning: what the stored rows say</h1>
<p>Made {{ date }} from {{ '{:,}'.format(material.rows|length) }} rows of {{ count.used }} runs
in {{ material.sources|join(', ') }}, with <code>{{ command }}</code>.
{% if count.stale %}
{{ count.runs }} runs are stored. {{ count.stale }} of them are stale: made by older code, or other data or weights, than there are now; any change
of a helper that their notebook uses counts.
{{ 'They are shown all the same; --fresh leaves them out.' if count.stale_shown else 'They are left out.' }}
{% else %}
No run is stale.
{% endif %}
{% if count.set_aside %}
Of {{ count.set_aside }} runs some or all rows are set aside, because another run measured the same edit, and more of it, or in a fuller profile.
{% endif %}
{% if count.light %}
{{ count.light }} of the runs shown are of the quick or the smoke profile, which train less; verdicts, figures and tables name the edits that are theirs.
{% endif %}
{% if material.unfinished %}
{{ material.unfinished }} runs failed or never ended, and have no rows here.
{% endif %}
</p>

<h2>What tiny models are evidence of</h2>
<p>The bundled models have a few million parameters and were trained here, on the very facts that are then edited. Their architectures are those of the
paper's models. They can show that a method, a measure or an attack works, that an effect can exist, and that a claim does not hold for every
model. They cannot show how large an effect is in {{ theirs|join(', ') }}: facts were learned in few phrasings, fact lookup spans
few layers, and little else was learned that an edit could harm. A claim that holds here is a reason to test it on a large model; one that
fails here is not refuted for one. The intervals speak of other facts of this kind and of other seeds, not of other models.</p>

<h2>Verdicts</h2>
<p>Claims were written down in <code>data/claims.yaml</code> before any sweep. A claim holds or fails only where the
{{ '{:.0f}'.format(100 * rule.level) }} % interval over facts and seeds lies beyond or short of its margin, with p of at most {{ rule.alpha }} after Holm's correction
within a family and model, at least {{ rule.min_seeds }} seeds, and few facts missing; else it is undecided. A cell gives the comparison that is farthest from holding: the mask
minus its rival, [interval], then both means. Published figures are recomputed from the authors' repository at commit a36be56, as means of
probabilities.</p>
{% if count.stale_shown %}
<p>{{ count.stale_shown }} of the {{ count.used }} runs behind these verdicts are stale: code, data or weights have changed since.</p>
{% endif %}
{% if tally %}
<p>{% for model, verdicts in tally.items() %}{{ model }}: {{ verdicts.holds }} hold, {{ verdicts.fails }} fail, {{ verdicts.undecided }} undecided with data,
{{ verdicts['not run'] }} not run. {% endfor %}</p>
{% endif %}
{% if decided|length %}
<p>The comparisons that decide. A claim holds if all of the interval lies on its side of the margin, and fails if one of its comparisons lies short of it.</p>
<div class="scroll"><table id="decided">
<thead><tr>{% for name in decided.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in decided.itertuples(index=False) %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<div class="scroll"><table id="verdicts">
<thead><tr><th>Claim</th><th>Published</th>{% for model in models %}<th>{{ model }}</th>{% endfor %}</tr></thead>
<tbody>
{% for family in families %}
<tr class="family"><th colspan="{{ 2 + models|length }}">{{ family.question }}</th></tr>
{% for entry in family.claims %}
{% set claim = entry.claim %}
<tr id="{{ claim.id }}">
<td class="claim">{{ claim.statement }}<br /><span class="small">{{ claim.id }}; {{ 'published' if claim.origin == 'published' else 'our own question' }};
{{ claim.facts }}; {{ claim.measure }}, {{ readings.get(claim.reading, 'nats a token') }}; {{ claim.direction }} by {{ claim.margin }}</span>
{% if claim.caveat %}
<details><summary>caveat</summary><span class="small">{{ claim.caveat }}</span></details>
{% endif %}
</td>
<td class="cell">
{% for line in entry.published %}
<details{{ ' open="open"'|safe if loop.first }}><summary>{{ line.measure }}</summary><span class="small">
{% for mask, value in line['values'] %}{{ mask }} {{ value }}{{ '; ' if not loop.last }}{% endfor %} ({{ line.setting }}; {{ line.runs }} runs each)</span></details>
{% else %}
<span class="none">–</span>
{% endfor %}
</td>
{% for cell in entry.cells %}
<td class="cell">
{% if cell is string or cell.state == 'not run' %}
<span class="none">{{ cell if cell is string else cell.state }}</span>
{% else %}
<span class="{{ cell.verdict }}">{{ marks[cell.verdict] }} {{ cell.verdict }}</span> {{ cell.held }} of {{ cell.of }}
{% if cell.n_facts %}
<br /><span class="number">{{ cell['mask'] }}{{ ' vs ' + cell.against if cell.against }}: {{ cell|estimate(signed=cell.against != '') }}</span>
<br /><span class="small">holds if {{ cell|asked }}</span>
{% if cell.warning %}
<br /><span class="small"><strong>{{ cell.warning }}</strong></span>
{% endif %}
<br /><span class="small">{% if cell.against %}{{ cell.mean_a|number }} vs {{ cell.mean_b|number }}; {% endif %}{{ cell|counted }}
{% if claim.reading %}<br />{{ readings['top1' if claim.reading == 'probability' else 'probability'] }}: {{ cell|estimate("other_value", cell.against != "") }}{% endif %}</span>
{% endif %}
{% if cell.reason %}
<details><summary>why</summary><span class="small">{{ cell.reason }}</span></details>
{% endif %}
{% endif %}
</td>
{% endfor %}
</tr>
{% endfor %}
{% endfor %}
</tbody></table></div>

<h2>Worst case by method and mask</h2>
<p>Share of the forgotten facts whose true answer comes back under the worst attack that makes the model itself answer (top-1, settings chosen on one half of the
facts and read on the other). Lower is better, but only at equal cost: edits that collapsed stand last, and a dagger marks
edits that did not take: their new answer is given to less than {{ taken }} of the facts, in the trained words. Some of these facts were never forgotten. <em>Probes too</em> adds attacks that read activations, which
easily reach the ceiling of 1. {% for facts, level in chance.items() %}Guessing gets {{ level|number }} right on {{ facts }}. {% endfor %}</p>
{% if board|length %}
<div class="scroll"><table id="leaderboard">
<thead><tr><th>Model</th><th>Facts</th><th>Method</th><th>Mask</th><th>Worst case</th><th>by</th><th>Left alone</th><th>Probes too</th><th>New answer</th><th>Retained</th>
<th>Retained, MCQ</th><th>Text loss</th><th>Collapsed</th><th>Broken formats</th></tr></thead>
<tbody>
{% for _, row in board.iterrows() %}
<tr><td>{{ row.model }}</td><td>{{ row.facts }}</td><td>{{ row.method }}</td><td>{{ row['name'] }}</td>
<td class="number">{{ row|estimate('worst') }}<br /><span class="small">{{ row|counted('worst') }}</span></td><td>{{ row.attack }}</td>
{% for name in ('untouched', 'inside', 'edit', 'retain', 'mcq_retain', 'text_loss') %}
<td class="number">{{ row|estimate(name) }}<br /><span class="small">{{ row|counted(name) }}</span></td>
{% endfor %}
<td class="fails">{{ row.collapsed }}</td><td class="small">{{ row.broken }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="small">Costs are read on all facts that the evaluation asks, text loss once a seed. Of one seed there is no interval over seeds. Rows: {{ rows_of(board_made) }}</p>
{% else %}
<p class="none">No rows of attacks yet: <code>{{ sections[1].command }}</code></p>
{% endif %}

<h2>Where each localization looks</h2>
<p>Every choice has the budget that fact lookup sets. Shares are of its weights: how much lies in the layers that fact lookup names, how much in those of the
extraction heads. Overlap: with the choice from resampled facts (1: always the same). Area: how much of the answer is left as the ranking's components are knocked
out one after the other; small means that it names what the answer needs, which is not yet where the fact is stored. Intervals are over seeds; there is none where all seeds agree.</p>
{% if places|length %}
<div class="scroll"><table id="localizations">
<thead><tr><th>Model</th><th>Facts</th><th>Choice</th><th>In lookup layers</th><th>In extraction layers</th><th>Overlap</th><th>Area</th><th>Units, first seed</th>
<th>Seeds with these units</th></tr></thead>
<tbody>
{% for _, row in places.iterrows() %}
<tr><td>{{ row.model }}</td><td>{{ row.facts }}</td><td>{{ row.localization }}</td>
{% for name in ('lookup share', 'extraction share', 'overlap', 'knock-out area') %}
<td class="number">{{ row|estimate(name) }}</td>
{% endfor %}
<td class="small">{{ row.units }}</td><td>{{ row.same }} of {{ row.seeds }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="small">Rows: {{ rows_of(places_made) }}</p>
{% else %}
<p class="none">No rows yet: <code>python -m helpers.sweep sweeps/localization.yaml</code></p>
{% endif %}

{% for section in sections %}
<h2 id="{{ section.kind.name }}">{{ section.kind.title }}</h2>
<p>{{ section.kind.says }}
{% if section.pictures %}
Drawn: {{ readings[section.kind.reading] }}, with 95 % intervals over facts and seeds.</p>
{% else %}
</p><p class="none">No rows for this figure yet. They come from <code>{{ section.command }}</code>.</p>
{% endif %}
{% for picture in section.pictures %}
<h3>{{ picture.where }}</h3>
<p class="small">{{ picture.facts }} facts, {{ 'one seed' if picture.seeds == '1' else picture.seeds ~ ' seeds' }} an estimate. {{ picture.note }} Rows: {{ rows_of(picture.made) }}</p>
<img alt="{{ section.kind.title }}: {{ picture.where }}" src="data:image/png;base64,{{ picture.image }}" />
<details><summary>numbers</summary><div class="scroll"><table>
<thead><tr>{% for name in picture.table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in picture.table.itertuples(index=False) %}
<tr>{% for value in row %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></details>
{% endfor %}
{% endfor %}

<h2>Where the rows come from</h2>
<p>All rows shown: {{ rows_of(everything) }}. Packed files may not hold the minutes that their runs took.</p>
<div class="scroll"><table id="packs">
<thead><tr><th>Source</th><th>Notebook</th><th>Runs</th><th>Rows</th><th>Minutes</th><th>Machine</th><th>Started, first to last</th></tr></thead>
<tbody>
{% for _, row in packs.iterrows() %}
<tr><td>{{ row.source }}</td><td>{{ row.notebook }}</td><td>{{ row.runs }}</td><td>{{ '{:,.0f}'.format(row['rows']) }}</td><td>{{ row.minutes|number }}</td>
<td>{{ row.machine }}</td><td>{{ row['first'] }} – {{ row['last'] }}</td></tr>
{% endfor %}
</tbody></table></div>
<h3>By commit</h3>
<div class="scroll"><table id="provenance">
<thead><tr><th>Notebook</th><th>Profile</th><th>Commit</th><th>Code</th><th>Machine</th><th>Runs</th><th>Stale</th><th>Rows</th><th>Shown</th><th>Started, first to last</th></tr></thead>
<tbody>
{% for _, row in origin.iterrows() %}
<tr><td>{{ row.notebook }}</td><td>{{ row.profile }}</td><td><code>{{ row.commit }}</code></td><td><code>{{ row.code }}</code></td>
<td>{{ row.machine }}</td><td>{{ row.runs }}</td><td>{{ row.stale }}</td><td>{{ row.rows }}</td><td>{{ row.used }}</td><td>{{ row['first'] }} – {{ row['last'] }}</td></tr>
{% endfor %}
</tbody></table></div>
</body>
</html>
"""
