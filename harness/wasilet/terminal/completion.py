"""What makes a shell complete the tasks: Invoke's own answers, and for the tasks that take an app the samples too.

Invoke completes task names and options by ``--complete``, which starts Python once per key press. Samples and folders
need no process: the script lists the samples' folder by itself.
"""

from __future__ import annotations

import re

from wasilet.apps.samples import samples_root
from wasilet.errors import UsageError

APP_TASKS = ("build", "demo", "push", "run")

_BASH = """\
_wasilet_complete() {
    local word="${COMP_WORDS[COMP_CWORD]}" task="${COMP_WORDS[1]}" samples=@SAMPLES@
    COMPREPLY=()
    if [[ $word != -* && $COMP_CWORD -gt 1 && " @TASKS@ " == *" $task "* ]]; then
        local names
        names=$(cd -- "$samples" 2>/dev/null && printf '%s\\n' */demo.yaml)
        COMPREPLY=($(compgen -W "${names//\\/demo.yaml/}" -- "$word") $(compgen -o plusdirs -f -X '!*.wasm' -- "$word"))
        return
    fi
    local words=("${COMP_WORDS[@]:0:COMP_CWORD+1}")
    COMPREPLY=($(compgen -W "$("${words[0]}" --complete -- "${words[@]}" 2>/dev/null)" -- "$word"))
}
complete -F _wasilet_complete @PROGRAM@
"""

_ZSH = """\
autoload -Uz compinit && compinit -u 2>/dev/null
_wasilet_complete() {
    local samples=@SAMPLES@
    if [[ ${words[CURRENT]} != -* && $CURRENT -gt 2 && " @TASKS@ " == *" ${words[2]} "* ]]; then
        compadd -- ${samples}/*/demo.yaml(N:h:t)
        _files -g '*.wasm'
        return
    fi
    compadd -- ${(f)"$(${words[1]} --complete -- ${words[1,CURRENT]} 2>/dev/null)"}
}
compdef _wasilet_complete @PROGRAM@
"""

_FISH = """\
function __wasilet_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    if test (count $words) -gt 1; and contains -- $words[2] @TASKS@; and not string match -q -- '-*' $word
        for sample in @SAMPLES@/*/demo.yaml
            basename (dirname $sample)
        end
        __fish_complete_directories $word
        return
    end
    $words[1] --complete -- $words $word 2>/dev/null
end
complete --command @PROGRAM@ --no-files --arguments '(__wasilet_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str, program: str) -> str:
    """The script. Raises UsageError for another shell, and for a program that is no plain word."""
    if shell not in _SCRIPTS:
        raise UsageError(f"no completion for {shell!r}", hint="bash, zsh or fish")
    if not re.fullmatch(r"[A-Za-z0-9_./~-]+", program):
        raise UsageError(f"{program!r} is no program's name", hint="invoke, inv or ./run")
    quoted = "'" + str(samples_root()).replace("'", "'\\''") + "'"
    text = _SCRIPTS[shell].replace("@SAMPLES@", quoted).replace("@TASKS@", " ".join(APP_TASKS))
    return text.replace("@PROGRAM@", program).rstrip("\n")
