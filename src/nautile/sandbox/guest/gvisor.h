/* The agent as process 1 of a gVisor sandbox. Part of agent.c.
 *
 * runsc has made the namespaces and given the host's channel as stdin. There are no disks here, no control groups of version 2
 * and no pidfds. What belongs together is told by gVisor's "job" hierarchy, whose groups count nothing and only remember their
 * members. The tenant's root is an overlay over the read-only root that runsc was given, as a container's is over its layers.
 */
#define PLACE "/dev/.nautile"       /* for root alone */
#define GVISOR_ROOT PLACE "/root"
#define JOBS PLACE "/jobs"
#define KILL_ROUNDS 8               /* attempts to kill all members in one turn: they may fork meanwhile */

/* Send a signal to every member of a group, the oldest first or last; how many there are. */
static int signal_members(const char *group, int number, bool youngest_first) {
    static char text[1 << 20];
    char path[160];
    pid_t members[65536];
    int count = 0;
    snprintf(path, sizeof path, "%s/cgroup.procs", group);
    if (get_text(path, text, sizeof text) <= 0) return 0;
    for (char *at = text, *end; count < 65536; at = end) {
        pid_t member = strtol(at, &end, 10);
        if (end == at) break;
        if (member > 1) members[count++] = member;
    }
    for (int i = 0; number && i < count; i++) kill(members[youngest_first ? count - 1 - i : i], number);
    return count;
}

static bool job_is_gone(const char *group) {
    for (int round = 0; round < KILL_ROUNDS; round++)
        if (!signal_members(group, SIGKILL, false)) return true;
    return false;
}

/* Stop what runs as the tenant, or let it go on: a parent stops before its children and goes on after them, and so sees
 * nothing of it. */
static void gvisor_freeze(bool frozen) {
    char path[600];
    DIR *jobs = opendir(JOBS);
    for (struct dirent *entry; jobs && (entry = readdir(jobs));) {
        snprintf(path, sizeof path, JOBS "/%s", entry->d_name);
        if (entry->d_name[0] == 'r') signal_members(path, frozen ? SIGSTOP : SIGCONT, !frozen);
    }
    if (jobs) closedir(jobs);
}

static int gvisor_furnish(const struct plan *plan) {
    const char *needed[] = {"dev", "proc", "tmp", "workspace"};
    char path[512];
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, GVISOR_ROOT "/%s", needed[i]);
        if (!mkdir(path, 0755) && i == 3) TRY(chown(path, TENANT, TENANT));
    }
    for (int i = 0; i < plan->binds; i++) {
        snprintf(path, sizeof path, GVISOR_ROOT "%s", plan->bound[i]);
        TRY(mount(plan->bound[i], path, NULL, MS_BIND | MS_REC, NULL));
    }
    TRY(mount("/dev", GVISOR_ROOT "/dev", NULL, MS_BIND, NULL));
    TRY(mount("/dev/pts", GVISOR_ROOT "/dev/pts", NULL, MS_BIND, NULL));
    TRY(mount("/dev/shm", GVISOR_ROOT "/dev/shm", NULL, MS_BIND, NULL));
    return 0;
}

/* Process 1 of the tenant's process namespace, in which all our children are from here on: they do not see this program, and
 * /proc has no descriptor and no memory of its own for them. */
static int gvisor_start_inner(void) {
    int told[2];
    char answer = 0;
    TRY(pipe2(told, O_CLOEXEC));
    TRY(unshare(CLONE_NEWPID));
    pid_t child = fork();
    TRY(child);
    if (!child) {
        if (mount("proc", GVISOR_ROOT "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) || chroot(GVISOR_ROOT) ||
            chdir("/") || write(told[1], "y", 1) != 1)
            _exit(1);
        close_range(0, INT32_MAX, 0);
        signal(SIGCHLD, SIG_IGN);
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
        drop_capabilities();
        for (;;) pause();
    }
    close(told[1]);
    ssize_t size = read(told[0], &answer, 1);
    close(told[0]);
    if (size != 1) errno = ECHILD;
    return size == 1 ? 0 : -1;
}

static int gvisor_listen(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(3128), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int reuse = 1;
    TRY(self.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    setsockopt(self.listener, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof reuse);
    TRY(bind(self.listener, (void *)&address, sizeof address));
    return listen(self.listener, 64);
}

static int gvisor_adjust(const struct plan *plan) {
    self.disk = strtoull(plan->disk, NULL, 10), self.open_files = strtoull(plan->open_files, NULL, 10);
    if (atoi(plan->proxy) && self.listener < 0) TRY(gvisor_listen());
    return 0;
}

static int gvisor_configure(const struct plan *plan) {
    char options[128];
    self.groups = JOBS, self.upper = PLACE "/upper", self.terminals = GVISOR_ROOT "/dev/pts";
    snprintf(options, sizeof options, "size=%s,mode=0700", plan->disk);
    TRY(mkdir(PLACE, 0700));
    TRY(mount("upper", PLACE, "tmpfs", MS_NODEV | MS_NOSUID, options));
    TRY(mkdir(PLACE "/upper", 0755)); TRY(mkdir(PLACE "/work", 0755)); TRY(mkdir(GVISOR_ROOT, 0755)); TRY(mkdir(JOBS, 0700));
    TRY(mount("jobs", JOBS, "cgroup", 0, "job"));
    TRY(mount("overlay", GVISOR_ROOT, "overlay", MS_NODEV | MS_NOSUID,
              "lowerdir=/,upperdir=" PLACE "/upper,workdir=" PLACE "/work"));
    TRY(gvisor_furnish(plan));
    TRY(gvisor_start_inner());
    TRY(sethostname(plan->hostname, strlen(plan->hostname)));
    return gvisor_adjust(plan);
}

/* The child of a stream: become a member of its group, and see the tenant's root. */
static int gvisor_step_inside(int group) {
    sigset_t none;
    TRY(dprintf(group, "%d", getpid()));
    TRY(chroot(GVISOR_ROOT));
    TRY(chdir("/"));
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    return 0;
}

/* openat2 step by step, where it is missing: every step is opened by itself and is no link. */
static int open_stepwise(int directory, const char *path, uint64_t flags) {
    char step[256];
    struct stat found;
    int current = fcntl(directory, F_DUPFD_CLOEXEC, 3);
    while (current >= 0) {
        path += strspn(path, "/");
        size_t length = strcspn(path, "/");
        bool last = !path[length + strspn(path + length, "/")];
        if (length >= sizeof step || (length == 2 && !strncmp(path, "..", 2))) {
            close(current), errno = length == 2 ? EXDEV : ENAMETOOLONG;
            return -1;
        }
        snprintf(step, sizeof step, "%.*s", (int)length, length ? path : ".");
        int following = openat(current, length ? step : ".", O_PATH | O_NOFOLLOW | O_CLOEXEC);
        if (following >= 0 && !fstat(following, &found) && S_ISLNK(found.st_mode)) {
            close(following);
            following = -1, errno = ELOOP;
        } else if (following >= 0 && last && !(flags & O_PATH)) { /* now as what it is wanted; it may have been replaced */
            close(following);
            following = openat(current, length ? step : ".", flags | O_NOFOLLOW | O_CLOEXEC);
        } else if (following >= 0 && ((!last && !S_ISDIR(found.st_mode)) || (last && flags & O_DIRECTORY && !S_ISDIR(found.st_mode)))) {
            close(following);
            following = -1, errno = ENOTDIR;
        }
        int why = errno;
        close(current);
        errno = why;
        if (following < 0 || last) return following;
        current = following, path += length;
    }
    return -1;
}
