{{/* The pod of a node agent and its ranks, for a StatefulSet and for a LeaderWorkerSet. */}}
{{- define "starfish.rankPod" -}}
{{- $ranks := .root.Values.ranks }}
metadata:
  labels: {{- include "starfish.selector" . | nindent 4 }}
  {{- with $ranks.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "starfish.podSettings" . | nindent 2 }}
  {{- with $ranks.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if $ranks.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- if and $ranks.affinity.podAntiAffinity (ne $ranks.antiAffinity "none") }}
  {{- fail "ranks.affinity.podAntiAffinity needs ranks.antiAffinity: none" }}
  {{- end }}
  {{- if or $ranks.affinity (ne $ranks.antiAffinity "none") }}
  affinity:
    {{- with $ranks.affinity }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if eq $ranks.antiAffinity "required" }}
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels: {{- include "starfish.selector" . | nindent 14 }}
    {{- else if eq $ranks.antiAffinity "preferred" }}
    podAntiAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: kubernetes.io/hostname
            labelSelector:
              matchLabels: {{- include "starfish.selector" . | nindent 16 }}
    {{- end }}
  {{- end }}
  topologySpreadConstraints:
    {{- if $ranks.topologySpreadConstraints }}
    {{- toYaml $ranks.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    - maxSkew: 1
      topologyKey: topology.kubernetes.io/zone
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "starfish.selector" . | nindent 10 }}
    {{- end }}
  # preStop runs within it, then the agent stops its ranks.
  terminationGracePeriodSeconds: {{ add (ternary (add $ranks.drain.timeoutSeconds 10) 0 $ranks.drain.enabled) $ranks.stopGraceSeconds 10 }}
  containers:
    - name: agent
      image: {{ include "starfish.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- if eq $ranks.transferProtocol "rdma" }}
          add: [IPC_LOCK]
          {{- end }}
      # The pod's number says which ranks are its own.
      command:
        - sh
        - -euc
        - |
          first=$(({{ .index }} * {{ $ranks.perHost }}))
          last=$((first + {{ sub $ranks.perHost 1 }}))
          {{- if $ranks.dataInterface }}
          data_host=$(python -c 'import fcntl, socket, struct, sys
          request = struct.pack("256s", sys.argv[1].encode())
          found = fcntl.ioctl(socket.socket(), 0x8915, request)
          print(socket.inet_ntoa(found[20:24]))' {{ $ranks.dataInterface }})
          {{- else }}
          data_host=$POD_IP
          {{- end }}
          exec starfish agent --node "$POD_NAME" --ranks "$first-$last" \
            --control-host "$POD_IP" --data-host "$data_host" "$@"
        - agent
      args:
        {{- include "starfish.commonArgs" .root | nindent 8 }}
        {{- if .root.Values.etcd.tls.enabled }}
        - --rank-etcd-cert=/etc/starfish/rank-etcd/tls.crt
        - --rank-etcd-key=/etc/starfish/rank-etcd/tls.key
        {{- end }}
        - --model={{ .root.Values.model.path }}
        - --device={{ $ranks.device }}
        - --transfer-protocol={{ $ranks.transferProtocol }}
        {{- with $ranks.ibDevice }}
        - --mooncake-ib-device={{ . }}
        {{- end }}
        - --control-port={{ $ranks.controlPort }}
        - --metrics-host=0.0.0.0
        - --metrics-port={{ $ranks.metricsPort }}
        - --stop-grace-s={{ $ranks.stopGraceSeconds }}
        {{- with $ranks.extraArgs }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with $ranks.rankArgs }}
        - --
        {{- toYaml . | nindent 8 }}
        {{- end }}
      env:
        {{- include "starfish.env" .root | nindent 8 }}
        {{- if $ranks.drain.enabled }}
        - name: STARFISH_ADMIN_URL
          value: http://{{ include "starfish.name" .root }}-control-plane:{{ .root.Values.controlPlane.adminPort }}
        - {name: STARFISH_ADMIN_TOKEN_FILE, value: /etc/starfish/admin/admin-token}
        {{- end }}
        {{- with $ranks.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: {{ $ranks.metricsPort }}}
        {{- range $i := until (int $ranks.perHost) }}
        - {name: control-{{ $i }}, containerPort: {{ add $ranks.controlPort $i }}}
        {{- end }}
      # Ready if all of its ranks are in the map. It is never restarted for not being so: the agent
      # starts ranks again by itself.
      readinessProbe:
        httpGet: {path: /health/ready, port: http}
        periodSeconds: 3
      livenessProbe:
        httpGet: {path: /health/live, port: http}
        initialDelaySeconds: 30
        periodSeconds: 10
        failureThreshold: 6
      {{- if $ranks.drain.enabled }}
      lifecycle:
        # A pod of this name may have been drained before it was replaced.
        postStart:
          exec:
            command: [sh, -c, 'starfish undrain "$POD_NAME" --no-wait --timeout 30 || true']
        # Returns when it is safe to terminate: no session and no expert depends on this pod.
        preStop:
          exec:
            command: [sh, -c, 'starfish drain "$POD_NAME" --grace {{ $ranks.drain.graceSeconds }} --timeout {{ $ranks.drain.timeoutSeconds }} || true']
      {{- end }}
      resources: {{- toYaml $ranks.resources | nindent 8 }}
      volumeMounts:
        {{- include "starfish.volumeMounts" .root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        - {name: kernel-cache, mountPath: /var/lib/starfish}
        {{- if .root.Values.etcd.tls.enabled }}
        - {name: rank-etcd-certificate, mountPath: /etc/starfish/rank-etcd, readOnly: true}
        {{- end }}
        {{- if $ranks.drain.enabled }}
        - {name: admin-token, mountPath: /etc/starfish/admin, readOnly: true}
        {{- end }}
  volumes:
    {{- include "starfish.volumes" . | nindent 4 }}
    - name: kernel-cache
      {{- toYaml ($ranks.kernelCache | default (dict "emptyDir" dict)) | nindent 6 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $ranks.shmSize }}}
    {{- if .root.Values.etcd.tls.enabled }}
    - name: rank-etcd-certificate
      secret: {secretName: {{ .root.Values.etcd.tls.secrets.rank }}, defaultMode: 0440}
    {{- end }}
    {{- if $ranks.drain.enabled }}
    - name: admin-token
      secret: {secretName: {{ .root.Values.secrets.admin }}, defaultMode: 0440}
    {{- end }}
{{- end }}
