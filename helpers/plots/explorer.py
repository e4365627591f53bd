"""A page within the page: choose pair, score, size and set, see what its ablation does. No kernel,
no network.
"""

import json

import pandas as pd
from IPython.display import HTML

from ..record import digest
from .style import COLOURS

PAGE = """<div id="__ID__" style="font:13px sans-serif;max-width:760px;border:1px solid #ccc;padding:10px">
<div class="choose" style="margin-bottom:8px"></div><div class="bars"></div>
<div class="answers" style="margin-top:8px"></div>
<script>(function(){
const box=document.getElementById('__ID__'),data=__DATA__,state={},part=name=>box.querySelector('.'+name);
const escape=t=>t.replace(/&/g,'&amp;').replace(/</g,'&lt;'),code=t=>'<code>'+escape(t)+'</code><br>';
['pair','score','size','set'].forEach(k=>{
 const label=document.createElement('label'),list=document.createElement('select');
 label.textContent=' '+(k=='set'?'ablated set of':k)+' ';
 data.choices[k].forEach(v=>list.add(new Option(v,v)));
 state[k]=data.choices[k][0];
 list.onchange=()=>{state[k]=list.value;draw()};
 label.append(list);part('choose').append(label)});
function bar(colour,top,height,value,most){
 return '<span style="position:absolute;top:'+top+'px;height:'+height+'px;background:'+colour
  +';width:'+Math.max(0,value)/most*400+'px"></span>'}
function draw(){
 const sets=data.choices.set,at=sets.indexOf(state.set),key=[state.pair,state.score,state.size].join('|');
 const alike=Object.keys(data.effects).filter(k=>k.startsWith(state.pair+'|')&&k.endsWith('|'+state.size));
 const most=Math.max(1e-9,...alike.flatMap(k=>data.effects[k].flat(2)));
 part('bars').innerHTML=!(key in data.effects)?'<p>not computed for this choice</p>':sets.map((c,i)=>{
  const [own,random]=data.effects[key][at][i];
  return '<div style="display:flex;align-items:center;margin:2px 0">'
   +'<span style="width:60px'+(i==at?';font-weight:bold':'')+'">'+c+'</span>'
   +'<span style="position:relative;width:410px;height:18px">'+bar(data.colours[i],0,11,own,most)
   +bar('#737373',12,4,random,most)+'</span><span>'+own.toFixed(3)+' (random '+random.toFixed(3)+')</span></div>'
 }).join('')+'<div style="color:#555">increase of the loss of each category, nats per reference token; '
  +'thin grey: as many random neurons of the same layers</div>';
 const found=data.answers[state.pair+'|'+state.score];
 part('answers').innerHTML=!found?'':'<b>One instruction of '+state.set+'</b> ('+data.shown+' ablated)<br>'
  +'<i>'+escape(data.prompts[state.set])+'</i><br>intact: '+code(data.intact[state.pair][state.set])
  +'without the set of '+state.set+': '+code(found[state.set][0])
  +'without as many random neurons: '+code(found[state.set][1])}
draw()})()</script></div>"""


def explorer(
    matrices: pd.DataFrame, shown: str, prompts: dict, intact: dict, answers: dict
) -> HTML:
    """Bars and answers behind four selectors, as one HTML fragment with its data in it.

    matrices  columns pair, score, size, ablated, measured, own, random
    shown     the size of the answers' sets, in words.  prompts: {category: instruction}
    intact    {pair: {category: answer}}.  answers: {(pair, score): {category: [without own set, without random]}}
    """
    effects, categories = {}, list(COLOURS)
    sizes = {size: f"{size * 100:g} %" for size in sorted(matrices["size"].unique())}
    for (pair, score, size), part in matrices.groupby(["pair", "score", "size"], sort=False):
        part = part.set_index(["ablated", "measured"])
        effects[f"{pair}|{score}|{sizes[size]}"] = [
            [
                [round(float(part.loc[(a, m), name]), 3) for name in ("own", "random")]
                for m in categories
            ]
            for a in categories
        ]
    choices = {
        "pair": list(matrices["pair"].unique()),
        "score": list(matrices["score"].unique()),
        "size": list(sizes.values()),
        "set": categories,
    }
    data = {
        "effects": effects,
        "choices": choices,
        "colours": list(COLOURS.values()),
        "shown": shown,
        "prompts": prompts,
        "intact": intact,
        "answers": {"|".join(key): value for key, value in answers.items()},
    }
    text = json.dumps(data, separators=(",", ":"), sort_keys=True).replace("</", "<\\/")
    return HTML(PAGE.replace("__DATA__", text).replace("__ID__", f"explorer-{digest(data)[:8]}"))
