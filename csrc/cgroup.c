/* The CPU time that control groups grant this process: version 2 (cpu.max) and version 1 (cpu.cfs_quota_us). */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

/* The first line of folder/name; 0 when there is no such file. */
static int first_line(const char *folder, const char *name, char *line, int size) {
    char path[PATH_BYTES + 64];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) return 0;
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    const int ok = fgets(line, size, f) != NULL;
    fclose(f);
    return ok;
}

/* CPUs granted by one group, or 0 when it sets no limit. */
static double quota_of(const char *folder) {
    char line[64], period_line[64];
    double quota = 0, period = 0;
    if (first_line(folder, "cpu.max", line, sizeof line)) {
        if (sscanf(line, "%lf %lf", &quota, &period) != 2) return 0; /* "max 100000" */
    } else if (first_line(folder, "cpu.cfs_quota_us", line, sizeof line) &&
               first_line(folder, "cpu.cfs_period_us", period_line, sizeof period_line)) {
        quota = atof(line); /* -1: no limit */
        period = atof(period_line);
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

/* The tightest limit from a group up to the root of its hierarchy. */
static double tightest(const char *base, const char *group) {
    char folder[PATH_BYTES];
    if (snprintf(folder, sizeof folder, "%s%s", base, group) >= (int)sizeof folder) return 0;
    const size_t root = strlen(base);
    double least = 0;
    for (;;) {
        const double q = quota_of(folder);
        if (q > 0 && (least == 0 || q < least)) least = q;
        char *slash = strrchr(folder, '/');
        if (!slash || (size_t)(slash - folder) < root) return least;
        *slash = 0;
    }
}

/* Whether a comma-separated list of controllers names "cpu". */
static int has_cpu(const char *list) {
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, "cpu", 3) && (at[3] == ',' || !at[3])) return 1;
    return 0;
}

double assay_cgroup_quota(void) {
    static const char *const v1[] = {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct", NULL};
    static const char *const v2[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified", NULL};
    FILE *f = fopen("/proc/self/cgroup", "r");
    if (!f) return 0;
    char line[PATH_BYTES];
    double least = 0;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        /* hierarchy:controllers:/group */
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *controllers++ = 0;
        *group++ = 0;
        const int second = !strcmp(line, "0") && !*controllers;
        if (!second && !has_cpu(controllers)) continue;
        if (!strcmp(group, "/")) group = "";
        for (const char *const *base = second ? v2 : v1; *base; base++) {
            const double q = tightest(*base, group);
            if (q > 0 && (least == 0 || q < least)) least = q;
        }
    }
    fclose(f);
    return least;
}
