"""At the end of a test run: what every notebook took."""


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = sorted(value for report in reports for name, value in report.user_properties if name == "notebook")
    if rows:
        terminalreporter.section("notebooks at smoke size")
        terminalreporter.write_line(f"{'':24} seconds  computing   GiB")
        for name, seconds, computing, gib in rows:
            terminalreporter.write_line(f"{name:24} {seconds:7.0f} {computing:10.0f} {gib:5.2f}")
        total, computing = (sum(row[i] for row in rows) for i in (1, 2))
        terminalreporter.write_line(f"{'all':24} {total:7.0f} {computing:10.0f}")
