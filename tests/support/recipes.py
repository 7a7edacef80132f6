"""What recipes leave behind."""


def statuses(report):
    return [result.status for result in report.results]


def outputs(folder):
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".gguflora" not in path.parts
    }
