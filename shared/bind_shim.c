/* Preloaded into a rank. Mooncake listens on all interfaces, without authentication, and no setting
 * changes that. This shim binds a stream socket to the address in STARFISH_DATA_BIND (default
 * 127.0.0.1) when the caller asks for the wildcard address, and marks it close-on-exec. It leaves
 * every other call as it is. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

typedef int (*bind_fn)(int, const struct sockaddr *, socklen_t);

static int is_stream(int fd) {
    int type = 0;
    socklen_t len = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_STREAM;
}

static int refuse(void) {
    errno = EADDRNOTAVAIL;
    return -1;
}

static int bind_v4(bind_fn next, int fd, const struct sockaddr *addr, const char *host) {
    struct sockaddr_in to;
    memcpy(&to, addr, sizeof to);
    if (inet_pton(AF_INET, host, &to.sin_addr) != 1) return refuse();
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return next(fd, (struct sockaddr *)&to, sizeof to);
}

/* The host is IPv4; an IPv6 socket is bound to its IPv4-mapped address. */
static int bind_v6(bind_fn next, int fd, const struct sockaddr *addr, const char *host) {
    struct sockaddr_in6 to;
    struct in_addr v4;
    int off = 0;
    memcpy(&to, addr, sizeof to);
    if (inet_pton(AF_INET, host, &v4) != 1) return refuse();
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    to.sin6_addr.s6_addr[10] = to.sin6_addr.s6_addr[11] = 0xff;
    memcpy(&to.sin6_addr.s6_addr[12], &v4, sizeof v4);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return next(fd, (struct sockaddr *)&to, sizeof to);
}

int bind(int fd, const struct sockaddr *addr, socklen_t len) {
    bind_fn next = (bind_fn)dlsym(RTLD_NEXT, "bind");
    const char *host = getenv("STARFISH_DATA_BIND");
    if (next == NULL) return refuse();
    if (host == NULL || *host == '\0') host = "127.0.0.1";
    if (addr != NULL && is_stream(fd)) {
        if (addr->sa_family == AF_INET && len >= sizeof(struct sockaddr_in) &&
            ((const struct sockaddr_in *)addr)->sin_addr.s_addr == htonl(INADDR_ANY))
            return bind_v4(next, fd, addr, host);
        if (addr->sa_family == AF_INET6 && len >= sizeof(struct sockaddr_in6) &&
            IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *)addr)->sin6_addr))
            return bind_v6(next, fd, addr, host);
    }
    return next(fd, addr, len);
}
